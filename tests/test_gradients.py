"""Surrogate gradients: exact values, published slopes, and the fused node against autograd."""

import math

import pytest
import torch
from torch import Tensor

from qexp.common.errors import FieldError
from qexp.gradients import DSQ, EWGS, Hard, Sigmoid, Soft, Straight
from qexp.grid import IntGrid, LevelGrid, Scale
from qexp.grid.float_formats import levels
from qexp.quantizers.fake_quantize import FakeQuantize

ROUNDINGS = [Straight(), Sigmoid(5), Sigmoid(40, "raw"), Sigmoid(4, "norm"), DSQ(), EWGS(0.5)]
CLAMPS = [Hard(), Soft(), Soft("silu", 2.0), Hard(steps_inside=False)]


def slope(function, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (made,) = torch.autograd.grad(function(x).sum(), x)
    return made


def middles(count: int = 1000) -> Tensor:
    """Evenly spaced positions within a cell, in double."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 32, generator=torch.Generator().manual_seed(0)) * 4


@pytest.mark.parametrize("rounding", ROUNDINGS, ids=str)
@pytest.mark.parametrize("clamp", CLAMPS, ids=str)
def test_no_surrogate_changes_a_value(x, rounding, clamp):
    assert torch.equal(rounding(x), x.round())
    assert torch.equal(clamp(x, -2, 3), x.clamp(-2, 3))
    for grid in (IntGrid(4), IntGrid(2, symmetric=True), IntGrid(3, real_zero=True)):
        q = grid.fit(x * 0.6)
        expected = grid.round(x, q)
        assert torch.equal(grid.round(x, q, rounding, clamp), expected)
        assert torch.equal(FakeQuantize(rounding, clamp)(x, q, grid), expected)


@pytest.mark.parametrize("t", [1.0, 2.0, 4.0, 5.0, 8.0, 20.0])
def test_mean_slope_of_the_sigmoid_is_tanh_of_a_quarter_of_t(t):
    u = middles(20_000)
    assert slope(Sigmoid(t, "raw"), u).mean().item() == pytest.approx(math.tanh(t / 4), rel=1e-6)
    assert slope(Sigmoid(t, "norm"), u).mean().item() == pytest.approx(1, rel=1e-6)
    extra = 1 / (math.exp(t) + 1)
    author = slope(Sigmoid(t, "author"), u)
    torch.testing.assert_close(author, slope(Sigmoid(t, "raw"), u) + extra)


def test_slopes_of_the_sigmoid_by_hand():
    at = torch.tensor([2.5, 2.0, -1.0])
    expected = torch.tensor(
        [1.25, 0.35051, 0.35051]
    )  # T/4 between steps, T p(1 - p), p = sigmoid(T/2), on one
    torch.testing.assert_close(slope(Sigmoid(5, "raw"), at), expected, atol=1e-5, rtol=0)
    assert slope(Sigmoid(200, "author"), at).isfinite().all()
    assert slope(Sigmoid(200, "author"), at).min() > 0


def test_a_flat_sigmoid_is_the_straight_through_estimator():
    u = middles() * 7 - 3
    one = torch.ones_like(u)
    torch.testing.assert_close(slope(Sigmoid(0.01, "norm"), u), one, atol=1e-4, rtol=0)
    assert torch.equal(slope(Straight(), u), one)


@pytest.mark.parametrize("t", [1.0, 5.0, 12.0])
def test_a_normed_sigmoid_is_dsq(t):
    u = middles() * 5 - 2
    dsq = DSQ(1 - math.tanh(t / 4))
    torch.testing.assert_close(slope(Sigmoid(t, "norm"), u), slope(dsq, u))


def test_ewgs_scales_by_the_signed_error_of_the_unit_range():
    x = torch.tensor([1.3, 1.8], requires_grad=True)
    (grad,) = torch.autograd.grad((EWGS(0.5)(x, 3) * torch.tensor([2.0, -3.0])).sum(), x)
    errors = torch.tensor([0.3, -0.2]) / 3
    expected = torch.tensor([2.0, -3.0]) * (1 + 0.5 * torch.tensor([1.0, -1.0]) * errors)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize(("gate", "near"), [("gelu", 1e-12), ("silu", 1e-4)])
def test_soft_clamp_is_the_published_sum(gate, near):
    soft, a, b = Soft(gate), -8.0, 7.0
    v = torch.linspace(-14, 14, 501, dtype=torch.float64)
    gate_of = torch.special.ndtr if gate == "gelu" else torch.sigmoid
    printed = v * gate_of(v - a) * gate_of(b - v) + a * gate_of(a - v) + b * gate_of(v - b)
    torch.testing.assert_close(soft.soft(v, a, b), printed, atol=near, rtol=0)
    ends = torch.tensor([a, b], dtype=torch.float64)
    within = 1e-6 if gate == "gelu" else 1e-4
    torch.testing.assert_close(soft.soft(ends, a, b), ends, atol=within, rtol=0)
    torch.testing.assert_close(
        slope(lambda u: soft(u, a, b), ends), torch.full_like(ends, 0.5), atol=1e-4, rtol=0
    )
    codes = soft.soft(v, a, b).round()
    assert codes.min() == a and codes.max() == b  # the overshoot is below half a step


@pytest.mark.parametrize(("gate", "over"), [("gelu", 0.170), ("silu", 0.278)])
def test_soft_clamp_overshoots_as_computed(gate, over):
    v = torch.linspace(-14, 14, 20_001, dtype=torch.float64)
    made = Soft(gate).soft(v, -8.0, 7.0)
    assert made.max().item() - 7 == pytest.approx(over, abs=1e-3)
    changed = (made.round() != v.clamp(-8, 7).round()).double().mean().item()
    assert changed == pytest.approx({"gelu": 0.020, "silu": 0.060}[gate], abs=2e-3)


@pytest.mark.parametrize("soft", [Soft(), Soft("silu"), Soft("gelu", 3.0)], ids=str)
def test_slope_of_the_soft_clamp_is_the_derivative(soft):
    v, step = torch.linspace(-12, 12, 401, dtype=torch.float64), 1e-6
    numeric = (soft.soft(v + step, -8.0, 7.0) - soft.soft(v - step, -8.0, 7.0)) / (2 * step)
    torch.testing.assert_close(slope(lambda u: soft(u, -8, 7), v), numeric, atol=1e-8, rtol=0)


def test_slopes_of_the_soft_clamp_stay_in_their_range():
    v = torch.linspace(-14, 14, 20_001, dtype=torch.float64)
    for gate, low, high in (("gelu", -0.129, 1.129), ("silu", -0.100, 1.100)):
        made = slope(lambda u, gate=gate: Soft(gate)(u, -8.0, 7.0), v)
        assert (made.min().item(), made.max().item()) == pytest.approx((low, high), abs=1e-3)


@pytest.mark.parametrize("fused", [False, True])
def test_straight_and_hard_are_lsq(x, fused):
    """1902.08153, equations 3 and 5, with codes from -8 to 7."""
    grid = IntGrid(4, symmetric=True)
    scale = torch.full((1, 1), 0.7, requires_grad=True)
    weight, upstream = x.clone().requires_grad_(), torch.randn_like(x)
    gain = 1 / math.sqrt(x.numel() * 7)
    q = Scale(scale, torch.full((1, 1), 8.0))
    y = (
        FakeQuantize()(weight, q, grid, gain)
        if fused
        else grid.round(weight, q, Straight(), Hard())
    )
    y.backward(upstream)
    v = x / 0.7
    inside = (v > -8) & (v < 7)
    published = torch.where(inside, v.round() - v, v.clamp(-8, 7))
    assert 0 < inside.float().mean() < 1
    wanted = (upstream * published).sum() * (gain if fused else 1)
    torch.testing.assert_close(scale.grad.squeeze(), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad, upstream * inside)


def test_offset_gradient_is_that_of_lsq_plus(x):
    """2004.09576: the offset moves only with what is clipped."""
    grid = IntGrid(4, real_zero=True)
    zero = torch.full((1, 1), 6.3, requires_grad=True)
    FakeQuantize()(x, Scale(torch.full((1, 1), 0.5), zero), grid).sum().backward()
    v = x / 0.5 + 6.3
    clipped = ((v < 0) | (v > 15)).sum()
    torch.testing.assert_close(zero.grad.squeeze(), -0.5 * clipped)


def test_pact_moves_its_level_with_what_lies_beyond():
    grid, scale = IntGrid(4), torch.full((1, 1), 0.2, requires_grad=True)
    x = torch.tensor([[0.1, 1.7, 3.1, 5.0, 9.0]])
    y = FakeQuantize(clamp=Hard(steps_inside=False))(x, Scale(scale, torch.zeros(1, 1)), grid)
    y.sum().backward()
    assert scale.grad.item() == pytest.approx(15 * 3)  # level = 15 · scale; three lie beyond 3.0


@pytest.mark.parametrize("rounding", ROUNDINGS, ids=str)
@pytest.mark.parametrize("clamp", [*CLAMPS[:3], Soft(forward="soft")], ids=str)
@pytest.mark.parametrize(
    ("grid", "share", "dynamic"),
    [
        (IntGrid(3, real_zero=True), 0.5, False),
        (LevelGrid("nf4"), 0.5, False),
        (IntGrid(3), 1.0, True),
        (IntGrid(3, symmetric=True), 1.0, True),
        (IntGrid(3, symmetric=True), 0.9, True),
    ],
    ids=["codes", "levels", "asymmetric", "symmetric", "a narrower interval"],
)
def test_the_fused_node_is_the_formula_under_autograd(x, rounding, clamp, grid, share, dynamic):
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))

    def gradients(function) -> tuple[Tensor, ...]:
        q = grid.fit(x * share)
        leaves = [t.clone().requires_grad_() for t in (x, q.scale, q.zero)]
        fitted = q.fitted if dynamic else None
        y = function(leaves[0], Scale(leaves[1], leaves[2], fitted=fitted))
        # the zero point of levels is always 0 and no part of the formula
        moved = leaves if grid.has_zero else leaves[:2]
        return (y.detach(), *torch.autograd.grad((y * upstream).sum(), moved))

    plain = gradients(lambda w, q: grid.round(w, q, lambda c: rounding(c, grid.top), clamp))
    fused = gradients(lambda w, q: FakeQuantize(rounding, clamp)(w, q, grid))
    for one, two in zip(plain, fused, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


DYNAMIC = [
    IntGrid(8, symmetric=True),
    IntGrid(4, symmetric=True, group_size=8),
    IntGrid(3),
    IntGrid(3, group_size=8),
    IntGrid(8, symmetric=True, scale_dtype="bfloat16"),
    IntGrid(4, per_tensor=True),
    LevelGrid("nf4", scale_dtype="float16"),
]


@pytest.mark.parametrize("grid", DYNAMIC, ids=str)
def test_a_dynamic_min_max_range_clips_nothing(x, grid):
    """A gradient of 1 at both ends too, in the fused node as in the formula; and of the values none
    is farther than half a step from where it was, one where the scale itself is rounded."""
    for data in (x, -x, x * 1e-3):
        upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        leaf = data.clone().requires_grad_()
        y = FakeQuantize().rows(leaf, grid.scales_of(data), grid)
        (made,) = torch.autograd.grad((y * upstream).sum(), leaf)
        assert torch.equal(made, upstream)
        assert torch.equal(y, grid(data))
        if isinstance(grid, LevelGrid):
            continue
        scale = grid.scales_of(data).scale.repeat_interleave(x.shape[1] // grid.groups(32), 1)
        most = 0.5 if grid.scale_dtype == "float32" else 1.0
        assert ((y - data).abs() <= scale * (most + 1e-4)).all()
        flat = grid.scales_of(data).map(lambda part: part.reshape(-1, 1))
        for clamp in (torch.clamp, Hard()):
            plain = slope(
                lambda w, flat=flat, clamp=clamp: grid.round(w, flat, Straight(), clamp),
                data.reshape(len(flat.scale), -1),
            )
            torch.testing.assert_close(plain, torch.ones_like(plain))


def test_a_dynamic_range_that_is_narrower_clips_what_lies_outside_of_it():
    x = torch.tensor([[-9.0, -8.0, -2.0, 0.0, 2.0, 8.0, 9.0]])
    grid = IntGrid(4, symmetric=True)
    q = grid.fit(x[:, 1:-1])  # codes reach from -8.53 to 7.47
    made = slope(lambda u: FakeQuantize().rows(u, q, grid), x)
    assert made.tolist() == [[0, 1, 1, 1, 1, 1, 0]]
    codes = slope(lambda u: FakeQuantize().rows(u, q._replace(fitted=None), grid), x)
    assert codes.tolist() == [[0, 1, 1, 1, 1, 0, 0]]  # as scales that train have it


def test_what_lies_more_than_a_step_beyond_the_codes_is_clipped_whatever_the_range():
    """A zero point cannot leave the codes: a range far from 0 saturates without it."""
    x = torch.tensor([[3.0, 4.0, 5.0, 6.0]])
    grid = IntGrid(2, include_zero=False)
    assert grid(x).tolist() == [[3.0, 3.0, 3.0, 3.0]]
    made = slope(lambda u: FakeQuantize().rows(u, grid.scales_of(x), grid), x)
    assert made.tolist() == [[1, 1, 0, 0]]


def test_rounding_lets_through_what_was_clipped():
    """R = 1 there, so that the soft clamp alone decides."""
    grid, q = IntGrid(3), Scale(torch.ones(1, 1), torch.zeros(1, 1))
    v = torch.tensor([[-0.6, 7.4, 3.5]])
    made = slope(lambda u: grid.round(u, q, Sigmoid(20, "raw"), Soft()), v)
    soft = slope(lambda u: Soft()(u, 0.0, 7.0), v)
    torch.testing.assert_close(made, soft * torch.tensor([[1.0, 1.0, 5.0]]))


def test_a_soft_forward_is_left_behind_outside_of_training(x):
    grid = IntGrid(3)
    q = grid.fit(x * 0.5)
    formula = FakeQuantize(Straight(), Soft("silu", forward="soft"))
    assert not torch.equal(formula(x, q, grid), grid.round(x, q))
    assert torch.equal(formula(x, q, grid, training=False), grid.round(x, q))


KINDS = ["nf4", "e2m1", "e4m3", "e5m2"]
UNIT = Scale(torch.ones(1, 1), torch.zeros(1, 1))


def spread(kind: str) -> tuple[Tensor, Tensor]:
    """Values within, on, midway between and beyond the levels of a format; and the levels."""
    table = torch.tensor(levels(kind))
    between = [table[:-1] + share * table.diff() for share in (0.0, 0.01, 0.3, 0.5, 0.7)]
    far = torch.full_like(between[3], torch.inf)
    nearly = [torch.nextafter(between[3], side) for side in (-far, far)]
    ends = table[[0, -1]]
    beyond = [ends, torch.nextafter(ends, 2 * ends), 1.01 * ends, 3 * ends]
    return torch.cat([*between, *nearly, *beyond])[None], table


@pytest.mark.parametrize("rounding", ROUNDINGS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_no_surrogate_changes_a_level(kind, rounding):
    (v, table), grid = spread(kind), LevelGrid(kind)
    expected = grid.round(v, UNIT)
    assert torch.equal(expected, table[grid.encode(v, UNIT).long()])
    for clamp in CLAMPS:
        assert torch.equal(grid.round(v, UNIT, rounding, clamp), expected)
        assert torch.equal(FakeQuantize(rounding, clamp)(v, UNIT, grid), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fused", [False, True])
def test_levels_train_straight_through_between_their_ends(kind, fused):
    (v, table), grid = spread(kind), LevelGrid(kind)
    inside = (v >= table[0]) & (v <= table[-1])
    plain = slope(lambda x: grid.round(x, UNIT, Straight(), Hard()), v)
    made = slope(lambda x: FakeQuantize()(x, UNIT, grid), v) if fused else plain
    assert torch.equal(made, inside.float())


@pytest.mark.parametrize("rounding", ROUNDINGS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_surrogates_measure_uneven_levels_in_codes(kind, rounding):
    """At the same share of a step the slope is the same, however wide the step is."""
    table = torch.tensor(levels(kind))
    for share in (0.2, 0.45, 0.9):
        v = (table[:-1] + share * table.diff())[None]
        made = slope(lambda x: LevelGrid(kind).round(x, UNIT, rounding), v)
        wanted = slope(rounding, torch.full_like(v, 1 + share))
        torch.testing.assert_close(made, wanted, rtol=1e-3, atol=1e-3)


def test_a_scale_of_levels_has_the_gradient_of_lsq(x):
    grid = LevelGrid("nf4")
    q = grid.fit(x)
    scale = (q.scale * 0.5).requires_grad_()
    weight = x.clone().requires_grad_()
    y = FakeQuantize()(weight, Scale(scale, q.zero), grid)
    y.sum().backward()
    u = x / scale.detach()
    inside = u.abs() <= 1
    assert torch.equal(weight.grad, inside.float())
    expected = (y.detach() / scale.detach() - u * inside).sum(1, keepdim=True)
    torch.testing.assert_close(scale.grad, expected, rtol=1e-4, atol=1e-4)


def test_the_equal_mean_control_is_a_constant():
    u = middles(20_000)
    control, raw = slope(Sigmoid(5, "mean"), u), slope(Sigmoid(5, "raw"), u)
    assert control.unique().numel() == 1
    assert control[0].item() == pytest.approx(raw.mean().item(), rel=1e-6)


@pytest.mark.parametrize("fine", [False, True])
def test_gradients_stop_where_llm_qat_s_code_stops_them(fine):
    """At |x| = 2, though nothing is clipped there; values stay."""
    x, grid = torch.tensor([[-3.0, -1.9, 0.4, 2.0, 2.5]]), IntGrid(4, symmetric=True)
    formula = FakeQuantize(Sigmoid(5) if fine else Straight(), Hard(limit=2.0))
    q = grid.fit(x)
    assert torch.equal(formula(x, q, grid), grid.round(x, q))
    made = slope(lambda u: formula(u, q, grid), x)
    assert torch.equal(made != 0, torch.tensor([[False, True, True, False, False]]))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Sigmoid(5, "other"),
        lambda: Sigmoid(0.0),
        lambda: Soft("relu"),
        lambda: Soft(forward="later"),
        lambda: DSQ(1.5),
        lambda: EWGS(-0.1),
        lambda: Hard(limit=0.0),
        lambda: Soft(sharpness=float("inf")),
    ],
)
def test_settings_out_of_range_are_refused(make):
    with pytest.raises(FieldError, match="give"):
        make()
