"""RoLoRA and its control: adapters trained and merged, after rotations or before them."""

import csv
from pathlib import Path

import pytest
import torch
from helpers.channels import close, logits
from helpers.models import joined, task_of
from helpers.pipeline import PPL, run
from hydra import compose

from qexp.common.errors import UserError
from qexp.config.instantiate import instantiate
from qexp.quantizers.adapter import LowRankUpdate
from qexp.quantizers.parametrization import attach_update, merge

pytestmark = pytest.mark.usefixtures("configured")

TINY = ["model=tiny_llama", "trainer=smoke", "trainer.steps=4"]


def changed(*words: str) -> tuple[torch.Tensor, set[str]]:
    """Logits after the transform, and which linears of the first block it moved."""
    task, batch = task_of("llama"), joined("llama")
    before = {name: p.detach().clone() for name, p in task.blocks[0].named_parameters()}
    step = instantiate(compose("config", [*TINY, *words]).transform)
    assert step(task, lambda: [batch]) == []
    after = dict(task.blocks[0].named_parameters())
    assert after.keys() == before.keys()
    return logits(task, batch), {n for n in before if not torch.equal(before[n], after[n])}


def test_a_merged_weight_is_what_the_parametrizations_made():
    task, batch = task_of("llama"), joined("llama")
    for linear in task.linears().values():
        update = LowRankUpdate.zero(linear.weight.detach(), 4, 16.0)
        update.up.data.normal_(std=0.01)
        attach_update(linear, update)
    expected = logits(task, batch)
    for linear in task.linears().values():
        merge(linear)
    assert torch.equal(logits(task, batch), expected)
    assert not any(hasattr(linear, "parametrizations") for linear in task.linears().values())


def test_adapters_move_queries_and_values_alone():
    before = logits(task_of("llama"), joined("llama"))
    after, moved = changed("transform=adapters", "transform.optimizer.weights=1e-2")
    assert moved == {"self_attn.q_proj.weight", "self_attn.v_proj.weight"}
    assert float((after - before).norm() / before.norm()) > 1e-3


@pytest.mark.parametrize("words", ["rolora", "adapters+quarot"])
def test_adapters_that_do_not_train_leave_the_rotated_model(words):
    still = "transform.steps.adapters.optimizer.weights=0.0"
    after, _ = changed(f"transform={words}", still)
    close(after, logits(task_of("llama"), joined("llama")), 1e-4)


def test_what_trains_after_the_rotation_is_the_rotated_model():
    rate = "transform.steps.adapters.optimizer.weights=1e-2"
    one, _ = changed("transform=rolora", rate)
    other, _ = changed("transform=adapters+quarot", rate)
    assert not torch.allclose(one, other, atol=1e-4)


def test_a_run_reloads_to_the_same_number(tmp_path):
    words = ["transform=rolora", "method=gptq", "weight=channel_narrow", "activation=int4_token"]
    first = run(tmp_path / "first", *TINY, *words)
    again = run(tmp_path / "again", "model=from_run", f"run={tmp_path / 'first'}", small=[])
    assert again[PPL] == first[PPL]


def test_the_log_has_the_lines_of_every_training(tmp_path):
    run(tmp_path, *TINY, "trainer.every=2", "transform=rolora", "method=qat")
    found = lines(tmp_path / "training.csv")
    rows = [(line["training"], line["step"]) for line in found]
    assert rows == [("1", "2.0"), ("1", "4.0"), ("2", "2.0"), ("2", "4.0")]
    assert len({line["loss"] for line in found}) == 4
    tensors = lines(tmp_path / "training_tensors.csv")  # of weights on a grid: the method's
    assert {line["training"] for line in tensors} == {"2"}
    run(tmp_path / "alone", *TINY, "method=qat")
    assert "training" not in lines(tmp_path / "alone" / "training.csv")[0]


def lines(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_role_that_a_family_has_not_is_named():
    step = instantiate(compose("config", [*TINY, "transform=adapters"]).transform)
    with pytest.raises(UserError, match="blocks of this family have no"):
        step(task_of("gpt2"), lambda: [joined("gpt2")])
