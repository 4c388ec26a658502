"""Columns apart: sets solved in turn, and OWQ's sensitive columns."""

from dataclasses import replace
from math import inf

import pytest
import torch
from helpers.problems import is_stored_whole, loss, problem

from qexp.common.errors import UserError
from qexp.grid import IntGrid
from qexp.grid.ranges import MSE
from qexp.packed.parts import Parts
from qexp.solvers import GPTQ, RTN, SpQR
from qexp.solvers.apart import Cast, in_turn
from qexp.solvers.factor import inverse_factor
from qexp.solvers.owq import OWQ

ROW = IntGrid(3, scale_dtype="float16")
BASE = GPTQ(ROW, damp=0.0)


def near(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool((ours - theirs).abs().lt(1e-5).double().mean() > 0.99)


def test_parts_in_turn_are_one_sweep() -> None:
    """Two sets with the same scales, which the groups of one sweep have."""
    weight, hessian = problem()
    grid = IntGrid(3, group_size=32)
    whole = GPTQ(grid, fit_every=1)(weight, hessian)
    upper = inverse_factor(hessian, 0.01).upper
    base = GPTQ(grid, damp=0.0, fit_every=1)
    parts = in_turn(weight, upper, [(64, base), (32, replace(base, grid=IntGrid(3)))])
    assert near(torch.cat([part.weight for part in parts], 1), whole.weight)


def test_later_columns_are_the_best_ones() -> None:
    """The columns after a part minimize tr(Δ H Δᵀ) given its error."""
    weight, hessian = problem()
    upper = inverse_factor(hessian, 0.0).upper
    parts = in_turn(weight, upper, [(60, RTN(ROW)), (36, Cast("float32"))])
    ours = torch.cat([part.weight for part in parts], 1)
    slope = ((ours - weight).double() @ hessian.double())[:, 60:]
    assert float(slope.abs().max()) < 1e-3 * float(hessian.diagonal().mean())


@pytest.mark.parametrize("grid", [ROW, IntGrid(3, group_size=32, range=MSE(steps=20))], ids=str)
@pytest.mark.parametrize("order", [False, True])
def test_without_float_columns_it_is_gptq(grid: IntGrid, order: bool) -> None:
    weight, hessian = problem()
    gptq = GPTQ(grid, act_order=order, static_groups=order, fit_every=1)
    ours = OWQ(replace(gptq, damp=0.0), extra=0.0)(weight, hessian)
    theirs = gptq(weight, hessian)
    assert near(ours.weight, theirs.weight)
    assert ours.bits == theirs.bits and type(ours.packed) is type(theirs.packed)


def test_with_every_column_apart_the_weight_is_left() -> None:
    weight, hessian = problem()
    solution = OWQ(BASE, columns=96)(weight, hessian)
    assert torch.equal(solution.weight, weight.half().float())
    assert solution.bits == 16 and is_stored_whole(solution)


def test_the_float_columns_are_the_most_sensitive_and_are_stored_so() -> None:
    weight, hessian = problem()
    solver = OWQ(BASE, columns=5)
    solution = solver(weight, hessian)
    assert isinstance(solution.packed, Parts) and solution.packed.listed is not None
    change = RTN(ROW)(weight).weight - weight
    sensitivity = hessian.diagonal() * change.square().sum(0)
    assert set(solution.packed.listed.tolist()) == set(sensitivity.topk(5).indices.tolist())
    apart = solution.weight[:, solution.packed.listed]
    assert not torch.equal(apart, weight[:, solution.packed.listed].half().float())
    assert torch.equal(apart, apart.half().float())


def test_with_no_correlation_the_float_columns_do_not_change() -> None:
    weight, _ = problem()
    solver = OWQ(RTN(ROW), columns=5)
    solution = solver(weight, torch.eye(96))
    assert isinstance(solution.packed, Parts) and solution.packed.listed is not None
    listed = solution.packed.listed
    torch.testing.assert_close(solution.weight[:, listed], weight[:, listed].half().float())


def test_more_float_columns_err_less() -> None:
    errors = torch.zeros(5)
    for seed in range(5):
        weight, hessian = problem(seed=seed)
        for index, count in enumerate((0, 2, 6, 12, 40)):
            ours = OWQ(BASE, columns=count)(weight, hessian).weight
            errors[index] += loss(ours - weight, hessian)
    assert errors.tolist() == sorted(errors.tolist(), reverse=True)


@pytest.mark.parametrize("extra", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("shape", [(48, 96), (192, 64)])
def test_bits_are_those_of_the_formula(extra: float, shape: tuple[int, int]) -> None:
    weight, hessian = problem(*shape)
    solver = OWQ(BASE, extra=extra)
    solution = solver(weight, hessian)
    rows, columns = shape
    count = solver.weak(rows, columns)
    share = count / columns
    index = min(16 * count, columns) / weight.numel()
    expected = 3 * (1 - share) + 16 * share + (16 + 3) / columns + index
    assert solution.bits == pytest.approx(expected) and is_stored_whole(solution)
    assert abs(solver.extra - 13 * share - 16 * count / weight.numel()) <= 7 / columns
    assert solution.paper_bits == pytest.approx(3 + 13 * share)


def test_groups_are_counted_without_the_float_columns() -> None:
    weight, hessian = problem()
    solver = OWQ(GPTQ(IntGrid(3, group_size=32), damp=0.0), columns=4)
    packed = solver(weight, hessian).packed
    assert isinstance(packed, Parts)
    assert [part.shape[1] for part in packed.parts] == [64, 28, 4]


def test_any_solver_on_a_grid_can_have_float_columns() -> None:
    weight, hessian = problem()
    grid = IntGrid(3, group_size=16, include_zero=False, real_zero=True)
    base = SpQR(grid, threshold=inf, damp=0.0)
    errors = [
        loss(OWQ(base, columns=count)(weight, hessian).weight - weight, hessian)
        for count in (0, 16)
    ]
    assert errors[1] < 0.8 * errors[0]


def test_what_cannot_be_is_refused() -> None:
    for wrong in ({"extra": 1.0}, {"extra": -0.1}, {"columns": -1}, {"damp": -1.0}):
        with pytest.raises(UserError, match=rf"method\.solver\.{next(iter(wrong))}="):
            OWQ(BASE, **wrong)
    with pytest.raises(UserError, match=r"method\.solver\.base\.carry: .*target=asymmetric"):
        OWQ(replace(BASE, carry=0.25))
    with pytest.raises(UserError, match=r"columns=97: a layer has 96 inputs"):
        OWQ(BASE, columns=97).check(48, 96)
    with pytest.raises(UserError, match="group_size=5 does not divide"):
        OWQ(GPTQ(IntGrid(3, group_size=5))).check(48, 96)
