"""Few values on both sides of 0: published formulas, reach, storage, gradients."""

import math

import pytest
import torch
from torch import Tensor

from qexp.common.errors import UserError
from qexp.gradients import Hard
from qexp.grid import IntGrid, Scale, StepGrid
from qexp.grid.step_grid import LeastSquares, MeanMagnitude
from qexp.packed.bitpacking import pack_trits, unpack_trits
from qexp.packed.coded import Coded
from qexp.quantizers.fake_quantize import FakeQuantize
from qexp.solvers import RTN


@pytest.fixture
def x() -> Tensor:
    return torch.randn(12, 64, generator=torch.Generator().manual_seed(0))


def seq(x: Tensor, a: Tensor, levels: int) -> Tensor:
    """ParetoQ's formula, 2502.02631: a (round(n clip(x / a) - h) + h) / n."""
    n, h = {4: (2, 0.5), 3: (1.5, 0.0)}[levels]
    return a * (torch.round(n * (x / a).clamp(-0.99, 0.99) - h) + h) / n


@pytest.mark.parametrize("levels", [3, 4])
@pytest.mark.parametrize("share", [1.0, 0.6])
def test_it_is_stretched_elastic_quantization(levels: int, share: float, x: Tensor) -> None:
    grid = StepGrid(levels)
    a = share * x.abs().amax(1, keepdim=True)
    made = grid.round(x, grid.scale_for(-a, a))
    torch.testing.assert_close(made, seq(x, a, levels))


@pytest.mark.parametrize("levels", [2, 3, 4, 5, 16])
def test_no_value_lies_farther_than_half_a_step(levels: int, x: Tensor) -> None:
    grid = StepGrid(levels)
    q = grid.fit(x)
    assert float(((grid(x) - x).abs() / q.scale).max()) <= 0.5 + 1e-5
    assert all(len(row.unique()) <= levels for row in grid(x)) and grid(x).isfinite().all()
    torch.testing.assert_close(grid(x).abs().amax(1, keepdim=True), (levels - 1) / 2 * q.scale)


def test_sixteen_values_are_four_bits_with_a_zero_point_of_seven_and_a_half(x: Tensor) -> None:
    grid = StepGrid(16)
    q = grid.fit(x)
    other = IntGrid(4, real_zero=True, include_zero=False)
    assert torch.equal(grid(x), other.round(x, Scale(q.scale, torch.full_like(q.scale, 7.5))))
    assert grid.bits == 4 == StepGrid(2).with_bits(4).bits


def test_a_row_of_zeros_survives() -> None:
    assert StepGrid(3)(torch.zeros(2, 8)).tolist() == torch.zeros(2, 8).tolist()


def test_bitnet_s_values(x: Tensor) -> None:
    """2402.17764: s clip(round(W / s), -1, 1) with s = mean|W| over the matrix."""
    grid = StepGrid(3, per_tensor=True, range=MeanMagnitude())
    s = x.abs().mean()
    torch.testing.assert_close(grid(x), s * (x / s).round().clamp(-1, 1))
    with pytest.raises(UserError, match=r"^weight/range=mean: .*weight=ternary"):
        IntGrid(2, range=MeanMagnitude()).check(12, 64)


def test_a_ternary_matrix_is_no_fixed_point() -> None:
    """The mean magnitude counts zeros, so that rounding again shrinks the step."""
    ternary = torch.tensor([[1.0, 0.0, -1.0, 0.0]])
    made = StepGrid(3, per_tensor=True, range=MeanMagnitude())(ternary)
    assert made.tolist() == [[0.5, 0.0, -0.5, 0.0]]


@pytest.mark.parametrize(
    ("levels", "bits"), [(2, 1.0), (3, 1.6), (4, 2.0), (5, 3.0), (9, 4.0), (16, 4.0)]
)
def test_stored_bits(levels: int, bits: float, x: Tensor) -> None:
    grid = StepGrid(levels, group_size=32, scale_dtype="float16")
    solution = RTN(grid)(x)
    assert solution.bits == pytest.approx(bits + 16 / 32, abs=1 / x.numel())
    assert grid.cost(*x.shape) == pytest.approx(bits + 16 / 32)
    packed = solution.packed
    restored = Coded.restore(packed.stored(), packed.layout())
    assert torch.equal(restored.dequantize(), solution.weight)
    stored = sum(8 * t.numel() * t.element_size() for t in packed.stored().values())
    assert packed.size() <= stored < packed.size() + 8
    printed = None if levels != 3 else pytest.approx(math.log2(3) + 0.5, abs=1e-3)
    assert solution.paper_bits == printed


@pytest.mark.parametrize("count", [1, 4, 5, 6, 1001])
def test_five_trits_fill_a_byte(count: int) -> None:
    codes = torch.randint(3, (count,), generator=torch.Generator().manual_seed(count))
    packed = pack_trits(codes)
    assert packed.dtype == torch.uint8 and len(packed) == -(-count // 5)
    assert torch.equal(unpack_trits(packed, (count,)), codes)


@pytest.mark.parametrize("levels", [3, 4])
def test_gradients_are_paretoq_s(levels: int, x: Tensor) -> None:
    """Weights up to half a step beyond the last value have a gradient of 1; the scale's is that of
    a, (w - x) / a inside and ± (L - 1) / L outside, with a = L / 2 steps."""
    grid = StepGrid(levels)
    a = 0.6 * x.abs().amax(1, keepdim=True)
    scale = (2 / levels * a).requires_grad_()
    leaf = x.clone().requires_grad_()
    q = Scale(scale, torch.full_like(a, grid.unstored_zero))
    made = FakeQuantize(clamp=Hard(beyond=0.5))(leaf, q, grid)
    made.sum().backward()
    inside = (x.abs() < a).float()
    assert torch.equal(leaf.grad, inside)
    of_a = torch.where(inside == 1, (made.detach() - x) / a, x.sign() * (levels - 1) / levels)
    torch.testing.assert_close(
        scale.grad, levels / 2 * of_a.sum(1, keepdim=True), rtol=1e-4, atol=1e-4
    )


def test_everything_passes_where_nothing_is_beyond(x: Tensor) -> None:
    grid = StepGrid(3, per_tensor=True, range=MeanMagnitude())
    for beyond, passes in ((0.0, False), (math.inf, True)):
        leaf = x.clone().requires_grad_()
        FakeQuantize(clamp=Hard(beyond=beyond))(leaf, grid.fit(x), grid).sum().backward()
        assert bool((leaf.grad == 1).all()) is passes


@pytest.mark.parametrize("levels", [1, 257, 0])
def test_other_numbers_of_values_are_refused(levels: int) -> None:
    with pytest.raises(UserError, match=rf"^levels={levels}: give a whole number from 2 to 256"):
        StepGrid(levels)


@pytest.mark.parametrize("levels", [2, 3])
def test_least_squares_is_the_best_step(levels: int, x: Tensor) -> None:
    x = x[~(x == 0).all(1)]
    best = StepGrid(levels, range=LeastSquares())
    error = (best(x) - x).square().sum(1)
    for share in torch.linspace(0.02, 1.2, 200):
        tried = StepGrid(levels)
        q = tried.scale_for(-share * x.abs().amax(1, True), share * x.abs().amax(1, True))
        assert (error <= (tried.round(x, q) - x).square().sum(1) * (1 + 1e-5)).all()
    weight = torch.randint(1, 4, x.shape).float()  # as often as a histogram counts
    repeated = [row.repeat_interleave(n.long())[None] for row, n in zip(x, weight, strict=True)]
    counted = best.fit(x, weight).scale.flatten()
    each = torch.cat([best.fit(row).scale.flatten() for row in repeated])
    torch.testing.assert_close(counted, each)


def test_least_squares_is_refused_where_levels_are_many() -> None:
    for grid in (StepGrid(4, range=LeastSquares()), IntGrid(2, range=LeastSquares())):
        with pytest.raises(UserError, match=r"^weight/range=least_squares: .*weight=seq"):
            grid.check(4, 8)
