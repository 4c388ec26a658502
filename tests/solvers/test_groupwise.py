"""SliM-LLM: pairs of groups, identities, bits from storage."""

from dataclasses import replace

import pytest
import torch
from helpers.problems import is_stored_whole, loss, problem

from qexp.common.errors import UserError
from qexp.grid import IntGrid
from qexp.packed.parts import Parts
from qexp.solvers import GPTQ
from qexp.solvers.factor import inverse_factor
from qexp.solvers.groupwise import MixedGroups, divergence

GRID = IntGrid(3, group_size=16, scale_dtype="float16")


def uneven(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer in which some groups of inputs matter much more."""
    weight, hessian = problem(seed=seed)
    sizes = torch.tensor([0.2, 8.0, 1.0, 0.1, 3.0, 0.5]).repeat_interleave(16)
    return weight, hessian * sizes * sizes[:, None]


class Fixed(MixedGroups):
    """A number of pairs that is known: `least`."""

    def pairs(self, *_: object) -> int:
        return self.least


@pytest.mark.parametrize("bits", [2, 3])
def test_no_pair_is_gptq(bits: int) -> None:
    weight, hessian = uneven()
    grid = replace(GRID, bits=bits)
    ours = Fixed(grid)(weight, hessian)
    theirs = GPTQ(grid, fit_every=1)(weight, hessian)
    assert (ours.weight - theirs.weight).abs().lt(1e-5).double().mean() > 0.99
    assert ours.bits == pytest.approx(theirs.bits + 2 * 6 / weight.numel())


@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize("bits", [2, 4])
def test_bits_are_those_of_the_formula(pairs: int, bits: int) -> None:
    weight, hessian = uneven()
    solution = Fixed(replace(GRID, bits=bits), least=pairs)(weight, hessian)
    assert isinstance(solution.packed, Parts) and solution.packed.choice is not None
    steps = (solution.packed.choice - 1).tolist()
    assert steps.count(1) == steps.count(-1) == pairs
    zeros = 16 if bits == 2 else 3  # one-bit groups have a zero point of 16 bits
    zero = (pairs * zeros + pairs * (bits + 1) + (6 - 2 * pairs) * bits) / 6
    expected = bits + (16 + zero) / 16 + 2 * 6 / weight.numel()
    assert solution.bits == pytest.approx(expected) and is_stored_whole(solution)
    assert solution.paper_bits == bits


def test_the_salient_groups_get_more() -> None:
    weight, hessian = uneven()
    solver = MixedGroups(GRID)
    salience = solver.salience(weight, inverse_factor(hessian, 0.01).upper)
    order = salience.argsort().tolist()
    widths = solver.widths(salience, 2)
    assert widths[order].tolist() == [2, 2, 3, 3, 4, 4]
    assert replace(solver, step=2).widths(salience, 1)[order].tolist() == [1, 3, 3, 3, 3, 5]


def test_scale_of_the_hessian_is_free() -> None:
    weight, hessian = uneven()
    solver = MixedGroups(GRID)
    first, second = (solver(weight, factor * hessian) for factor in (1, 1000))
    assert (first.weight - second.weight).abs().lt(1e-5).double().mean() > 0.99
    small, large = (
        solver.salience(weight, inverse_factor(factor * hessian, 0.01).upper)
        for factor in (1, 1000)
    )
    torch.testing.assert_close(small / small.sum(), large / large.sum(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("bits", [2, 3])
def test_the_choice_errs_less_than_any_fixed_one(bits: int) -> None:
    """And so less than GPTQ where groups differ much: means over layers."""
    totals = torch.zeros(4)
    grid = replace(GRID, bits=bits)
    for seed in range(3):
        weight, hessian = uneven(seed)
        solvers = [MixedGroups(grid), *(Fixed(grid, least=pairs) for pairs in range(3))]
        for index, solver in enumerate(solvers):
            ours = solver(weight, hessian).weight
            totals[index] += loss(ours - weight, hessian)
    assert totals[0] <= totals[1:].min() * 1.02
    assert totals[0] < 0.9 * totals[1]


def test_drawn_inputs_have_the_moments_of_the_hessian() -> None:
    weight, hessian = problem()
    drawn = MixedGroups(GRID, tokens=20000)._drawn(hessian)
    moments = 2 / len(drawn) * drawn.T @ drawn
    assert float((moments - hessian).norm() / hessian.norm()) < 0.1
    exact = divergence(drawn[:50], weight, weight)
    assert exact == 0 < divergence(drawn[:50], weight + 0.01 * torch.randn(48, 96), weight)
    first, second = (
        MixedGroups(GRID, metric="softmax_kl", seed=seed)(weight, hessian) for seed in (0, 0)
    )
    assert torch.equal(first.weight, second.weight)


def test_what_cannot_be_is_refused() -> None:
    for wrong in ({"step": 3}, {"step": 0}, {"least": -1}, {"metric": "kl"}, {"tokens": 0}):
        with pytest.raises(UserError, match=rf"method\.solver\.{next(iter(wrong))}="):
            MixedGroups(GRID, **wrong)
    with pytest.raises(UserError, match=r"least=3: weight\.group_size=16 cuts 96 inputs into 6"):
        MixedGroups(GRID, least=3).check(48, 96)
    with pytest.raises(UserError, match="group_size=5 does not divide"):
        MixedGroups(replace(GRID, group_size=5)).check(48, 96)
