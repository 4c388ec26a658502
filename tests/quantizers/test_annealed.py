"""Roundings that are not nearest in training: unbiased, annealed, hard in evaluation."""

from dataclasses import replace

import pytest
import torch

from qexp.common.errors import FieldError
from qexp.gradients import Hard, Straight
from qexp.grid import IntGrid
from qexp.quantizers.annealed import PARQ, Relaxed, Stochastic, stochastic
from qexp.quantizers.fake_quantize import FakeQuantize
from qexp.quantizers.scale_rules import LSQ, Dynamic, Static

GRID = IntGrid(3, group_size=8)


def weight(rows: int = 4) -> torch.Tensor:
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(0))


def test_stochastic_rounding_is_unbiased():
    """Mean, variance f (1 - f), and no move of a value on the grid."""
    torch.manual_seed(0)
    c = torch.tensor([0.0, 2.0, 0.25, 1.5, 2.9, -0.3]).double()
    draws = stochastic(c.expand(20000, 6))
    f = c - c.floor()
    bound = 4 * (f * (1 - f)).sqrt() / 20000**0.5
    assert ((draws.mean(0) - c).abs() <= bound + 1e-12).all()
    torch.testing.assert_close(draws.var(0), f * (1 - f), atol=0.01, rtol=0)
    assert (draws[:, :2] == c[:2]).all()
    assert ((draws - c.floor()) ** 2 == (draws - c.floor())).all()  # one of two neighbours


def test_random_numbers_are_those_of_the_seed_and_evaluation_has_none():
    made = Dynamic()(weight(), GRID, FakeQuantize(Stochastic()))
    torch.manual_seed(1)
    first = made(weight())
    assert not torch.equal(made(weight()), first)
    torch.manual_seed(1)
    assert torch.equal(made(weight()), first)
    assert torch.equal(made.eval()(weight()), GRID(weight()))
    assert torch.equal(made.coded(weight()).dequantize(), GRID(weight()))


@pytest.mark.parametrize("kind", [PARQ, Relaxed])
def test_annealing_goes_from_the_value_to_the_nearest_code(kind):
    c = torch.linspace(0, 7, 211)
    rule = kind(start=0.25, end=0.75)
    values = [rule.at(step, 100).value(c) for step in range(100)]
    torch.testing.assert_close(values[25], c)
    assert all(torch.equal(value, c.round()) for value in values[75:])
    errors = torch.stack([(value - c.round()).abs().sum() for value in values])
    assert (errors.diff() <= 1e-4).all() and errors[26] < errors[25]
    for value in values:  # monotone; whole numbers stay
        assert (value.diff() >= -1e-6).all()
        torch.testing.assert_close(value[::30], c[::30], atol=1e-6, rtol=0)
    if kind is PARQ:
        assert (values[50].diff() < 0.2).all()  # continuous: the slope is bounded by 1 / left


def test_parq_by_hand():
    """clip(c + (u - c) / k, lo, hi) around the middle c of two codes."""
    rule = replace(PARQ(), left=0.5)
    assert rule.value(torch.tensor([1.1, 1.4, 1.5, 1.65])).tolist() == pytest.approx(
        [1, 1.3, 1.5, 1.8]
    )
    halfway = PARQ(start=0.0, end=1.0).at(50, 100)
    assert isinstance(halfway, PARQ) and halfway.left == pytest.approx(0.5)
    assert PARQ(start=0.0, end=0.0).at(0, 9).left == 0.0


@pytest.mark.parametrize("rounding", [PARQ(left=0.3), Relaxed(left=0.3), Stochastic()], ids=str)
def test_gradients_are_those_at_the_rounded_values(rounding):
    """Weights: straight through. Scales: (q - z) - (v - z), with q as the forward pass had it."""
    made = LSQ("range")(weight(), GRID, FakeQuantize(rounding, Hard()))
    w = weight().requires_grad_()
    upstream = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    y = made(w)
    (y * upstream).sum().backward()
    q = made.scales(w).map(lambda part: part.detach().reshape(-1, 1))
    v = (w.detach().reshape(8, 8) / q.scale + q.zero).clamp(0, 7)
    codes = y.detach().reshape(8, 8) / q.scale + q.zero
    inside = ((w.detach().reshape(8, 8) / q.scale + q.zero) == v).float()
    torch.testing.assert_close(w.grad.reshape(8, 8), inside * upstream.reshape(8, 8))
    own = ((codes - q.zero) - (v - q.zero) * inside) * upstream.reshape(8, 8)
    share = 1 / (8 * made.highest_code) ** 0.5
    torch.testing.assert_close(made.scale.grad.reshape(8), share * own.sum(1), atol=1e-4, rtol=1e-3)


def test_a_step_of_training_sets_the_rounding():
    made = Static()(weight(), GRID, FakeQuantize(PARQ(end=1.0)))
    made.before_step(0, 10)
    groups = weight().reshape(8, 8)
    clipped = GRID.clip(groups, made.scales(weight()).map(lambda part: part.reshape(-1, 1)))
    torch.testing.assert_close(made(weight()).reshape(8, 8), clipped)
    made.before_step(10, 10)
    assert torch.equal(made(weight()), made.eval()(weight()))
    plain = Static()(weight(), GRID, FakeQuantize(Straight()))
    plain.before_step(3, 10)
    assert plain.fake_quantize == FakeQuantize(Straight())


def test_settings_that_cannot_work_are_refused():
    for fields, said in (
        ({"start": 0.9}, "start=0.9: annealing ends at 0.8"),
        ({"end": 2}, "end=2: give a number from 0 to 1"),
        ({"steepness": -1}, "steepness=-1"),
    ):
        with pytest.raises(FieldError, match=said):
            PARQ(**fields)
