"""The test loop of Lightning against a plain loop: the same numbers to the last digit."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from helpers.models import CONF, tiny
from helpers.protocols import changed, llama, protocol, start
from omegaconf import OmegaConf

from qexp.common.errors import UserError
from qexp.config.instantiate import instantiate
from qexp.eval import accuracy, against_float, continuations, loss, token_losses
from qexp.eval.base import Evaluator
from qexp.eval.harness import scoring
from qexp.eval.loop import measured
from qexp.task import TASKS, Task

pytestmark = pytest.mark.usefixtures("own_cache")


def plainly(task: Task, name: str, batches: Sequence, step: Callable) -> list:
    with torch.no_grad():
        return [step(batch) for batch in batches]


def from_conf(choice: str, **fields: object) -> Evaluator:
    data = OmegaConf.load(CONF / "data" / "synthetic.yaml")
    whole = OmegaConf.create({"data": data, "seed": 0, "eval": {}})
    whole.eval = OmegaConf.load(CONF / "eval" / f"{choice}.yaml")
    [node] = whole.eval.values()
    return instantiate(OmegaConf.merge(node, fields))


def of_windows(choice: str, **fields: object) -> Callable[[Path], object]:
    evaluator = protocol(choice, length=32, limit=5, batch_tokens=64, **fields)
    return lambda folder: (evaluator(llama()), evaluator.token_losses(llama())[3].tolist())


def of_both(evaluator: Evaluator) -> Callable[[Path], object]:
    return lambda folder: evaluator.measure_float(start(llama(), folder))(changed(0.05))


def of_requests(folder: Path) -> object:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(256, (12, 9), generator=generator).tolist()
    asked = [
        scoring.Request((1, 2, 3, 4, 5, *tokens[: 3 + at % 4]), 2)
        for at, tokens in enumerate(drawn)
    ]
    return scoring.score(llama(), asked, 3, "x")


def of_rows(folder: Path) -> object:
    images = TASKS["image_classification"](*tiny("vit")[:2]).eval()
    batches = {"sequences": 7, "length": 24}
    return (
        from_conf("accuracy", batch_rows=2)(images),
        from_conf("loss", batch_rows=2, batches=batches)(llama()),
    )


PROMPTS = ["one two", "three", "four five six"]
KINDS: dict[str, Callable[[Path], object]] = {
    "perplexity": of_windows("held_out"),
    "decoding": of_windows("decoding", prompt=8, chunk=4),
    "against_float": of_both(from_conf("against_float", protocol={"length": 32, "limit": 5})),
    "continuations": of_both(from_conf("continuations", prompts=PROMPTS, length=4)),
    "log-likelihoods": of_requests,
    "rows": of_rows,
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_loop_changes_no_digit(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = KINDS[kind](tmp_path)
    monkeypatch.setenv("QEXP_CACHE_DIR", str(tmp_path / "other"))
    calls = []
    for module in (accuracy, against_float, continuations, loss, token_losses, scoring):
        monkeypatch.setattr(module, "measured", lambda *args: calls.append(1) or plainly(*args))
    assert repr(found) == repr(KINDS[kind](tmp_path)) and calls


def test_the_model_stays_as_it_is() -> None:
    """Also the global random state, which training after a measurement of the float model uses."""
    task = llama()
    task.model.train()
    state, modes = torch.get_rng_state(), [module.training for module in task.modules()]
    found = measured(task, "x", [3, 1, 2], lambda n: (n, torch.is_grad_enabled()))
    assert found == [(3, False), (1, False), (2, False)]
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in task.modules()] == modes
    task.loss({"input_ids": torch.ones(1, 4, dtype=torch.long)}).backward()  # can be trained


def test_an_error_of_a_step_is_raised_as_it_is() -> None:
    def step(batch: int) -> None:
        raise UserError(f"batch {batch}")

    with pytest.raises(UserError, match=r"^batch 1$"):
        measured(llama(), "x", [1, 2], step)
