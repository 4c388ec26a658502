"""Parts that keep their start: frozen linears, outliers that train alone, norms of blocks."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.models import batches, task_of
from helpers.training import GRID, METHOD, same, weights

from qexp.common.errors import UserError
from qexp.grid import IntGrid
from qexp.hessian import Layerwise
from qexp.methods.block_losses import channel_statistics
from qexp.methods.block_phase import BlockPhase
from qexp.methods.blockwise import Blockwise, Direct
from qexp.methods.reconstruction import Reconstruction
from qexp.methods.staged import Staged
from qexp.packed.low_rank import LowRank
from qexp.quantizers.adapter import Adapter
from qexp.quantizers.fake_quantize import FakeQuantize
from qexp.quantizers.scale_rules import Constant
from qexp.quantizers.trained_outliers import TrainedOutliers
from qexp.runs.results import BLOCKS
from qexp.solvers import GPTQ, RTN
from qexp.solvers.base import error
from qexp.solvers.low_rank import Correction
from qexp.step import Step
from qexp.task import Task
from qexp.training.optimizer import AdamW
from qexp.training.trainable import TrainableParameters

ALL = ("q", "k", "v", "o", "gate", "up", "down")
G2 = IntGrid(2, group_size=16, scale_dtype="float16")
NOTHING = TrainableParameters(False, False, False, False)
NORMS = BlockPhase(
    G2,
    FakeQuantize(),
    Constant(),
    AdamW(weights=1e-3, warmup=0.0, floor=1.0, clip=None),
    epochs=1,
    loss="statistics",
    targets="inputs",
    trained="norms",
)


def after(method: Step, family: str = "llama") -> tuple[Task, list]:
    task = task_of(family)
    return task, method(task, lambda: batches(family))


def test_all_linears_frozen_are_those_of_round_to_nearest() -> None:
    frozen = TrainableParameters(embeddings=False, frozen=ALL)
    task, records = after(replace(METHOD, trained=frozen))
    nearest, _ = after(Direct(RTN(GRID)))
    for name, linear in task.linears().items():
        assert torch.equal(linear.weight, nearest.linears()[name].weight)
    changed = [n for n, t in weights(task).items() if not torch.equal(t, weights(nearest)[n])]
    assert changed and all("norm" in name for name in changed)
    assert len(records) == len(task.linears())


def test_a_frozen_role_stays_and_the_others_train() -> None:
    task, _ = after(replace(METHOD, trained=TrainableParameters(frozen=("o", "v"))))
    nearest, _ = after(Direct(RTN(GRID)))
    kept = {
        name.rpartition(".")[2]
        for name, linear in task.linears().items()
        if torch.equal(linear.weight, nearest.linears()[name].weight)
    }
    assert kept == {"o_proj", "v_proj"}


def test_a_frozen_linear_asks_for_no_gradient() -> None:
    """Else several processes would wait for it."""
    task = task_of()
    method = replace(METHOD, trained=TrainableParameters(frozen=("o",)))
    method.install(task, task.linears())
    chosen = {id(p) for group in method.trained.parameters(task).values() for p in group}
    for name, linear in task.linears().items():
        asks = {p.requires_grad for p in linear.parameters()}
        assert asks == ({False} if "o_proj" in name else {True, False}), name
        assert ("o_proj" in name) != any(id(p) in chosen for p in linear.parameters())


def test_none_frozen_is_the_plain_method() -> None:
    plain, _ = after(METHOD)
    other, _ = after(replace(METHOD, trained=TrainableParameters(frozen=())))
    assert same(weights(plain), weights(other))


def test_a_role_that_a_family_has_not_is_refused() -> None:
    method = replace(METHOD, trained=TrainableParameters(frozen=("gate", "v")))
    with pytest.raises(
        UserError, match=r"^method\.trained\.frozen: .* no gate and no v; give .*qkv"
    ):
        after(method, "gpt2")


def test_float_linears_can_be_frozen_too() -> None:
    task, _ = after(replace(METHOD, weight=None, trained=TrainableParameters(frozen=("down",))))
    start = weights(task_of())
    for name, tensor in weights(task).items():
        assert torch.equal(tensor, start[name]) is ("down_proj" in name), name


@pytest.mark.parametrize("by", ["magnitude", "error", "random"])
def test_outliers_alone_train(by: str) -> None:
    share = 0.02
    method = replace(METHOD, weight=G2, scale=TrainedOutliers(share, by))
    task, records = after(replace(method, trained=replace(NOTHING, scales=True)))
    start, _ = after(replace(method, trained=replace(NOTHING, scales=True), optimizer=AdamW(0.0)))
    for made in records:
        size = made.rows * made.columns
        count = round(share * size)
        changed = task.linears()[made.name].weight != start.linears()[made.name].weight
        assert 0 < int(changed.sum()) <= count
        own = made.packed.outliers
        assert own is not None and len(own.values) == count
        assert made.bits == pytest.approx(
            G2.cost(made.rows, made.columns) + (32 * count + 32 * made.rows) / size
        )


def test_no_outliers_are_round_to_nearest_and_all_of_them_the_weight() -> None:
    weight = task_of().linears()["model.layers.0.mlp.up_proj"].weight.detach()
    none = TrainedOutliers(0.0)(weight, G2, FakeQuantize())
    assert torch.equal(none(weight), G2(weight)) and none.coded(weight).outliers is None
    whole = TrainedOutliers(1.0, dtype="float32")(weight, G2, FakeQuantize())
    assert torch.equal(whole(weight), weight)
    assert torch.equal(whole.coded(weight).dequantize(), weight)


def test_kept_outliers_are_better_than_none() -> None:
    weight = task_of().linears()["model.layers.0.mlp.up_proj"].weight.detach().clone()
    weight[0, 0] = 10 * weight.abs().max()
    errors = [
        error(TrainedOutliers(share)(weight, G2, FakeQuantize())(weight).detach() - weight, None)
        for share in (0.0, 0.005)
    ]
    assert errors[1] < 0.95 * errors[0]


STARTS = {
    "rtn": Direct(RTN(G2)),
    "gptq": Blockwise(GPTQ(G2), Layerwise()),
    "low rank": Direct(RTN(G2), residual=Correction(3, "identity", rounds=2)),
}


@pytest.mark.parametrize("name", STARTS)
def test_without_a_step_a_stage_changes_nothing(name: str) -> None:
    """Of the model that `start` leaves: neither norms of blocks at a rate of 0 nor adapters."""
    base, before = after(STARTS[name])
    still = replace(NORMS, optimizer=AdamW(weights=0.0))
    task, records = after(Staged(STARTS[name], Reconstruction(still)))
    assert same(weights(task), weights(base))
    assert [made.bits for made in records] == [made.bits for made in before]
    tuned = replace(METHOD, weight=G2, scale=Constant(), trained=NOTHING, adapter=Adapter(3))
    task, records = after(Staged(STARTS[name], replace(tuned, optimizer=AdamW(0.0))))
    assert same(weights(task), weights(base))
    assert all(isinstance(made.packed, LowRank) for made in records)


@pytest.mark.parametrize("name", STARTS)
def test_adapters_train_on_what_another_method_stored(name: str) -> None:
    base, before = after(STARTS[name])
    tuned = replace(METHOD, weight=G2, scale=Constant(), trained=NOTHING, adapter=Adapter(3))
    task, records = after(Staged(STARTS[name], replace(tuned, optimizer=AdamW(1e-2))))
    for one, made in zip(before, records, strict=True):
        start = one.packed.whole()
        start = start.base if isinstance(start, LowRank) else start
        assert torch.equal(made.packed.whole().base.dequantize(), start.dequantize())
        assert not torch.equal(task.linears()[made.name].weight, base.linears()[made.name].weight)


def test_norms_of_blocks_move_and_nothing_else() -> None:
    base, _ = after(STARTS["gptq"])
    task, _ = after(Staged(STARTS["gptq"], Reconstruction(NORMS)))
    changed = {n for n, t in weights(task).items() if not torch.equal(t, weights(base)[n])}
    assert changed and all("layernorm" in name for name in changed)


def test_statistics_move_towards_the_float_block(tmp_path: Path) -> None:
    task = task_of(folder=tmp_path)
    method = Staged(STARTS["rtn"], Reconstruction(replace(NORMS, epochs=10)))
    method(task, lambda: batches("llama"))
    with (tmp_path / BLOCKS).open() as file:
        lines = [line for line in csv.DictReader(file) if line["block"] == "0"]
    losses = [float(line["loss"]) for line in lines]
    assert len(losses) == 10 and losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.95 * losses[0]


def test_equal_outputs_have_equal_statistics() -> None:
    x = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    assert float(channel_statistics(x, x)) == 0
    permuted = x.reshape(-1, 5)[torch.randperm(21)].reshape(x.shape)
    assert float(channel_statistics(permuted, x)) == pytest.approx(0, abs=1e-6)
    assert float(channel_statistics(x + 1, x)) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"loss": "other"}, "loss=other is unknown: give squares or statistics"),
        ({"targets": "other"}, "targets=other is unknown"),
        ({"trained": "other"}, "trained=other is unknown"),
        ({"growth": -1.0}, r"growth=-1\.0: give a finite number"),
        ({"unit": "linear"}, "loss=statistics: unit=linear trains on moments"),
        ({"loss_weight": "fisher"}, "loss_weight=fisher: loss=statistics has no squares"),
    ],
    ids=str,
)
def test_settings_of_blocks_are_checked(fields: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}"):
        replace(NORMS, **fields)
