"""Training in shards, with quantizers in place: the numbers, what is left of it, and resuming."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import pairs
from helpers.models import batches, task_of
from helpers.training import METHOD, SMOKE, STATIC, Same, same, weights

from qexp.common.errors import UserError
from qexp.grid import IntGrid
from qexp.quantizers.scale_rules import LSQ
from qexp.training import losses
from qexp.training.losses import CrossEntropy, LogitKL
from qexp.training.optimizer import AdamW
from qexp.training.trainable import TrainableParameters

FORKED = replace(SMOKE, strategy="fsdp", devices=2)


slow = partial(pytest.param, marks=pytest.mark.slow)


# What forks comes first: gloo does not connect in the fork of a process that has had a group.
@pytest.mark.slow
def test_a_killed_run_in_shards_ends_at_the_same_weights(tmp_path, monkeypatch):
    def trained(folder: str, seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        task = task_of("gpt2", tmp_path / folder)
        method = replace(METHOD, activations=[STATIC], validation=Same(batches("gpt2", 1)))

        def work() -> dict[str, torch.Tensor]:
            replace(method, trainer=FORKED)(task, lambda: batches("gpt2", rows=3))
            return weights(task)

        return pairs.together(work)

    whole, calls, plain = trained("whole", 5), [], CrossEntropy.__call__
    with monkeypatch.context() as patch:
        patch.setattr(losses.CrossEntropy, "__call__", dying(plain, calls))
        with pytest.raises(KeyError, match="killed"):
            trained("killed", 5)
    assert list((tmp_path / "killed").glob("training-*/last.ckpt"))
    assert same(trained("killed", 99), whole)


def dying(plain: Callable[..., torch.Tensor], calls: list[int]) -> Callable[..., torch.Tensor]:
    def loss(self: CrossEntropy, task, *rest) -> torch.Tensor:
        calls.extend([1] if task.training else [])
        if len(calls) == 5:
            raise KeyError("killed")
        return plain(self, task, *rest)

    return loss


@pytest.mark.slow
def test_what_both_processes_met_is_said_once():
    method = replace(METHOD, optimizer=AdamW(weights=1e30, warmup=0.0, clip=None), trainer=FORKED)
    with pytest.raises(UserError, match=r"^training: step \d+: .*finite.*(layers|norm|embed|head)"):
        pairs.together(lambda: method(task_of(), lambda: batches("llama")))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        (
            "llama",
            {
                "weight": IntGrid(4),
                "scale": LSQ("range", offset=True),
                "trained": TrainableParameters(offsets=True),
            },
        ),
        slow("gpt2", {"trainer": replace(SMOKE, recompute=True, accumulate=2)}),
        slow("bert", {"trained": TrainableParameters(weights=False, rank=2), "loss": LogitKL()}),
    ],
)
def test_shards_of_one_process_change_nothing(monkeypatch, family, changes):
    """Ties (gpt2, bert), learned scales inside and outside blocks; the model is the one it was."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)  # from which Lightning seeds shards again
    method = replace(METHOD, activations=[STATIC], validation=Same(batches(family, 1)), **changes)
    made, left = [], []
    for strategy in ("auto", "fsdp"):
        torch.manual_seed(5)
        task = task_of(family)
        objects = {name: id(p) for name, p in task.model.named_parameters() if "proj" not in name}
        trainer = replace(method.trainer, strategy=strategy)
        replace(method, trainer=trainer)(task, lambda: batches(family, rows=4))
        made.append(weights(task))
        left.append([(type(module), set(vars(module))) for module in task.modules()])
        now = {name: id(p) for name, p in task.model.named_parameters() if name in objects}
        assert family != "llama" or now == objects
    assert same(*made) and left[0] == left[1]


def test_a_fault_in_shards_is_not_hidden():
    method = replace(METHOD, trainer=replace(SMOKE, strategy="fsdp"))
    task = task_of()
    task.blocks[1].mlp.up_proj.weight.data *= 1e30
    task.blocks[1].mlp.gate_proj.weight.data *= 1e30
    with pytest.raises(UserError, match=r"step 0: .*layers\.1\.mlp"):
        replace(method, weight=None)(task, lambda: batches("llama"))
