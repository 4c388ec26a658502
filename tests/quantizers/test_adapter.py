"""Low-rank residuals that stay in storage: start, values, gradients, bits."""

import pytest
import torch
from helpers.problems import problem
from torch import Tensor, nn

from qexp.common.errors import FieldError, UserError
from qexp.gradients import Hard
from qexp.grid import Grid, IntGrid, LevelGrid
from qexp.packed.low_rank import LowRank
from qexp.quantizers.adapter import Adapter, LowRankUpdate
from qexp.quantizers.fake_quantize import FakeQuantize
from qexp.quantizers.parametrization import (
    attach_update,
    attach_weight_quantizer,
    bake,
    float_weight,
    weight_quantizer,
)
from qexp.quantizers.scale_rules import LSQ, Constant, FixedCodes, ScaleRule
from qexp.solvers import RTN
from qexp.solvers.low_rank import Correction

GRID = IntGrid(2, group_size=32, scale_dtype="float16")
DOUBLE = LevelGrid(
    "nf4",
    group_size=16,
    scale_dtype="float16",
    scales=IntGrid(8, include_zero=False, real_zero=True, scale_dtype="float16"),
)


def linear_of(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(*weight.T.shape, bias=False)
    linear.weight.data = weight.clone()
    return linear


def adapted(
    rule: ScaleRule, grid: Grid = GRID, adapter: Adapter | None = None
) -> tuple[nn.Linear, Tensor]:
    weight, _ = problem()
    linear = linear_of(weight)
    update = (adapter or Adapter(4)).of(linear, None)
    assert update is not None
    attach_weight_quantizer(linear, rule, grid, FakeQuantize(clamp=Hard()))
    attach_update(linear, update)
    return linear, weight


@pytest.mark.parametrize("grid", [GRID, DOUBLE], ids=["int", "double"])
def test_it_starts_as_the_base_bit_for_bit(grid: Grid) -> None:
    linear, weight = adapted(Constant(), grid)
    nearest = RTN(grid)(weight)
    for mode in (True, False):
        assert torch.equal(linear.train(mode).weight, nearest.weight)
    assert torch.equal(float_weight(linear), weight)
    packed = bake(linear)
    assert torch.equal(linear.weight, nearest.weight)
    extra = 16 * 4 * (48 + 96) / (48 * 96)
    assert packed.bits() == pytest.approx(nearest.bits + extra)


def test_rank_0_adds_nothing() -> None:
    assert Adapter(0).of(linear_of(problem()[0]), None) is None


@pytest.mark.parametrize("factors", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rule", [Constant(), FixedCodes(), LSQ("range")], ids=str)
def test_what_is_stored_is_what_evaluation_saw(rule: ScaleRule, factors: str) -> None:
    linear, _ = adapted(rule, adapter=Adapter(4, 3.0, factors))
    update = linear.parametrizations.weight[-1]  # type: ignore[index,union-attr]
    optimizer = torch.optim.SGD([p for p in linear.parameters() if p.requires_grad], 0.01)
    x = torch.randn(8, 96, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        linear(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert update.up.abs().max() > 0
    live = linear.train().weight.detach()
    seen = linear.eval().weight.detach()
    torch.testing.assert_close(seen, live, rtol=1e-5, atol=1e-5)
    packed = bake(linear)
    assert isinstance(packed, LowRank)
    assert torch.equal(packed.dequantize(), seen) and torch.equal(linear.weight, seen)
    assert packed.outputs.dtype == getattr(torch, factors)
    # two branches give what the merged weight gives
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
    outputs, inputs = packed.outputs.float(), packed.inputs.float()
    branches = x @ packed.base.dequantize().T + (x @ inputs.T) @ outputs
    torch.testing.assert_close(linear(x), branches, rtol=1e-5, atol=1e-4)


def test_codes_get_no_gradient() -> None:
    linear, _ = adapted(Constant())
    linear.weight.sum().backward()
    chain = linear.parametrizations.weight  # type: ignore[union-attr]
    assert chain.original.grad is None and not list(weight_quantizer(linear).parameters())
    assert chain[-1].up.grad is not None and chain[-1].down.grad is not None


@pytest.mark.parametrize("alpha", [4.0, 16.0])
def test_stored_factors_are_taken_up_exactly(alpha: float) -> None:
    weight, hessian = problem()
    start = Correction(6, "identity", rounds=3).around(RTN(GRID))(weight, hessian)
    assert isinstance(start.packed, LowRank)
    linear = linear_of(weight)
    update = Adapter(6, alpha).of(linear, start.packed)
    assert update is not None
    rule = Constant().known(start.packed.base)
    attach_weight_quantizer(linear, rule, GRID, FakeQuantize())
    attach_update(linear, update)
    assert torch.equal(linear.eval().weight, start.weight)
    assert torch.equal(bake(linear).dequantize(), start.weight)


def test_a_merged_update_is_not_stored() -> None:
    weight, _ = problem()
    linear = linear_of(weight)
    attach_update(linear, LowRankUpdate.zero(weight, 4, 16.0))
    attach_weight_quantizer(linear, FixedCodes(), GRID, FakeQuantize())
    assert not isinstance(bake(linear), LowRank)


def test_what_cannot_be_is_refused() -> None:
    weight, hessian = problem()
    start = Correction(6, factors="int4").around(RTN(GRID))(weight, hessian).packed
    with pytest.raises(UserError, match=r"residual\.factors: factors on a grid do not train"):
        Adapter(6).of(linear_of(weight), start)
    with pytest.raises(UserError, match=r"^method\.scale: .*LowRank.*method/scale=constant"):
        LSQ().known(start)
    with pytest.raises(FieldError, match=r"^adapter\.rank=49: a \[48, 96\] matrix has rank 48"):
        Adapter(49).check(48, 96)
    for wrong in ({"rank": -1}, {"alpha": 0.0}, {"factors": "int8"}):
        with pytest.raises(FieldError, match=next(iter(wrong))):
            Adapter(**wrong)  # type: ignore[arg-type]
