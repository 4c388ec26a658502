"""Coordinate descent and least squares after the sweep, and importance in range estimation."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from helpers.problems import TWO_LEVELS, is_stored_whole, loss, problem
from torch import Tensor

from qexp.common.errors import UserError
from qexp.grid import Grid, IntGrid, LevelGrid, Scale
from qexp.grid.half_quadratic import HalfQuadratic
from qexp.grid.ranges import MSE, RMS, MinMax, Percentile
from qexp.packed.coded import Coded
from qexp.solvers import GPTQ, Solution, SpQR
from qexp.solvers.base import Moments
from qexp.solvers.factor import damped
from qexp.solvers.importance import IMPORTANCES, importance_of
from qexp.solvers.quip import QuIP
from qexp.solvers.refine import descended, refined, refitted

REAL = {"include_zero": False, "real_zero": True}
GRIDS: dict[str, Grid] = {
    "row": IntGrid(2, scale_dtype="float16"),
    "groups": IntGrid(3, group_size=32, scale_dtype="float16"),
    "symmetric": IntGrid(3, symmetric=True, group_size=32, scale_dtype="float16"),
    "real zero": IntGrid(2, group_size=32, scale_dtype="float16", **REAL),
    "nf4": LevelGrid("nf4", group_size=32),
}
ORDERS = {
    "natural": {},
    "act_order": {"act_order": True, "static_groups": True},
    "scattered": {"act_order": True},
}
DAMP = 0.01


def coded(solution: Solution) -> Coded:
    assert isinstance(solution.packed, Coded)
    return solution.packed


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_no_half_step_raises_the_error(grid: Grid, order: dict) -> None:
    weight, hessian = problem()
    metric = damped(hessian, DAMP)
    packed = coded(GPTQ(grid, DAMP, **order)(weight, hessian))
    errors = [loss(packed.dequantize() - weight, metric)]
    for _ in range(3):
        for step in (refitted, lambda *args: descended(*args, "act_order" in order)):
            packed = step(packed, weight, metric)
            errors.append(loss(packed.dequantize() - weight, metric))
    assert all(b <= a * (1 + 1e-6) for a, b in pairwise(errors))
    assert errors[1] < errors[0] and errors[2] < errors[1]
    whole = GPTQ(grid, DAMP, descend=3, refit=True, **order)(weight, hessian)
    assert loss(whole.weight - weight, metric) <= errors[-1] * (1 + 1e-6)
    assert is_stored_whole(whole)
    assert whole.bits == GPTQ(grid, DAMP, **order)(weight, hessian).bits


def test_off_is_the_sweep_alone() -> None:
    weight, hessian = problem()
    packed = coded(GPTQ(GRIDS["groups"])(weight, hessian))
    assert refined(packed, weight, hessian, 0, False, False) is packed


def test_a_refit_is_the_regression_of_the_weights_on_their_codes() -> None:
    """In the metric H, over all groups of a row at once."""
    weight, hessian = problem()
    grid = IntGrid(3, group_size=32, **REAL)
    packed = coded(GPTQ(grid)(weight, hessian))
    ours = refitted(packed, weight, hessian).dequantize()
    root = torch.linalg.cholesky(hessian.double()).T
    member = torch.eye(3, dtype=torch.float64).repeat_interleave(32, 0)
    for row in range(0, 48, 12):
        design = torch.cat([packed.codes[row].double()[:, None] * member, member], 1)
        theta = torch.linalg.lstsq(root @ design, root @ weight[row].double()).solution
        torch.testing.assert_close(ours[row].double(), design @ theta, rtol=1e-4, atol=1e-4)


def test_with_codes_that_are_all_equal_nothing_breaks() -> None:
    weight, hessian = problem()
    grid = IntGrid(3, group_size=32, scale_dtype="float16", **REAL)
    packed = coded(GPTQ(grid)(weight, hessian))
    codes = packed.codes.clone()
    codes[:4], codes[4:8, :32] = 0, 5
    packed = replace(packed, codes=codes)
    ours = refitted(packed, weight, hessian).dequantize()
    assert ours.isfinite().all()
    assert loss(ours - weight, hessian) < loss(packed.dequantize() - weight, hessian)


def test_rows_are_refitted_alone_and_in_tiles(monkeypatch) -> None:
    weight, hessian = problem()
    packed = coded(GPTQ(GRIDS["groups"])(weight, hessian))
    whole = refitted(packed, weight, hessian).dequantize()
    monkeypatch.setattr("qexp.solvers.refine.TILE", 20)
    torch.testing.assert_close(refitted(packed, weight, hessian).dequantize(), whole)


def test_outliers_stay_and_the_rest_is_refitted() -> None:
    weight, hessian = problem()
    solver = SpQR(IntGrid(2, group_size=32, scale_dtype="float16", **REAL), outlier_dtype="float16")
    plain, ours = (replace(solver, refit=refit)(weight, hessian) for refit in (False, True))
    one, two = coded(plain).outliers, coded(ours).outliers
    assert one is not None and two is not None and len(one.values) > 20
    assert torch.equal(one.values, two.values) and torch.equal(one.columns, two.columns)
    metric = damped(hessian, solver.damp)
    assert loss(ours.weight - weight, metric) < loss(plain.weight - weight, metric)
    assert is_stored_whole(ours) and ours.bits == plain.bits


def test_quip_is_refitted_in_its_rotated_space() -> None:
    weight, hessian = problem()
    solver = QuIP(IntGrid(2, scale_dtype="float16", range=RMS(), **REAL), greedy=1)
    plain, ours = (replace(solver, refit=refit)(weight, hessian) for refit in (False, True))
    assert loss(ours.weight - weight, hessian) < loss(plain.weight - weight, hessian)
    assert is_stored_whole(ours) and ours.bits == plain.bits


@pytest.mark.parametrize("solver", [GPTQ, SpQR, QuIP])
def test_grids_whose_rows_share_numbers_are_not_refitted(solver) -> None:
    for grid in (TWO_LEVELS, IntGrid(3, per_tensor=True)):
        with pytest.raises(UserError, match=r"method\.solver\.refit=true: .* weight\.scales=null"):
            solver(grid, refit=True)


def test_what_gptaq_aims_at_is_refined_too() -> None:
    weight, hessian = problem()
    mixing = torch.eye(96) + 0.02 * torch.randn(96, 96, generator=torch.Generator().manual_seed(1))
    moments = Moments(hessian, mixing @ hessian)
    solver = GPTQ(GRIDS["groups"], carry=1.0)
    plain = solver(weight, hessian, moments)
    ours = replace(solver, descend=1, refit=True)(weight, hessian, moments)
    aim, metric = solver.aim(weight, moments), damped(hessian, solver.damp)
    assert loss(ours.weight - aim, metric) < loss(plain.weight - aim, metric)


RANGES = {
    "minmax": MinMax(),
    "mse": MSE(steps=20),
    "percentile": Percentile(90.0),
    "rms": RMS(),
    "hqq": HalfQuadratic(),
}


def test_without_a_choice_ranges_count_every_value_once() -> None:
    """And so give bit for bit what they give alone."""
    seen: list[Tensor | None] = []

    class Spy(MinMax):
        def __call__(self, x, grid, counts=None):
            seen.append(counts)
            return super().__call__(x, grid, counts)

    weight, hessian = problem()
    plain = GPTQ(IntGrid(3, group_size=32))(weight, hessian).weight
    for order in ORDERS.values():
        ours = GPTQ(IntGrid(3, group_size=32, range=Spy()), **order)(weight, hessian).weight
        assert order or torch.equal(ours, plain)
    assert seen and all(counts is None for counts in seen)


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("kind", IMPORTANCES)
def test_every_range_takes_an_importance(kind: str, name: str, order: dict) -> None:
    weight, hessian = problem()
    hessian[5], hessian[:, 5], weight[3] = 0, 0, 0  # an input that is always 0, a row of zeros
    grid = IntGrid(3, group_size=32, range=RANGES[name], **REAL)
    solution = GPTQ(grid, importance=kind, **order)(weight, hessian)
    assert solution.weight.isfinite().all() and is_stored_whole(solution)
    scaled = GPTQ(grid, importance=kind, **order)(weight, 1000 * hessian).weight
    errors = [loss(each - weight, hessian) for each in (solution.weight, scaled)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-2)  # a 0 may lie between two codes
    if name != "minmax":
        plain = GPTQ(grid, **order)(weight, hessian)
        assert not torch.equal(plain.weight, solution.weight)


def test_equal_importance_is_none() -> None:
    weight, _ = problem()
    grid = IntGrid(3, group_size=32, range=MSE())
    plain, ours = (GPTQ(grid, 0.0, importance=k)(weight, torch.eye(96)) for k in (None, "diagonal"))
    assert torch.equal(plain.weight, ours.weight)


def test_the_search_takes_the_interval_with_the_least_weighed_error() -> None:
    weight, hessian = problem()
    counts = importance_of("diagonal", hessian.diagonal(), hessian.diagonal())(weight, 0)
    assert counts is not None and float(counts.mean()) == pytest.approx(1.0)
    grid = IntGrid(3, range=MSE(norm=2.0))

    def errors(q: Scale) -> Tensor:
        return ((grid.round(weight, q) - weight).square() * counts).sum(1)

    weighed, plain = errors(grid.fit(weight, counts)), errors(grid.fit(weight))
    assert (weighed <= plain * (1 + 1e-5)).all() and (weighed < plain * 0.999).any()


def test_obs_is_the_cost_of_a_weight() -> None:
    weight, hessian = problem()
    factor = torch.linspace(0.5, 2.0, 96)
    ours = importance_of("obs", hessian.diagonal(), factor)(weight[:, 32:64], 32)
    expected = (weight[:, 32:64] / factor[32:64]).square()
    torch.testing.assert_close(ours, expected / expected.mean())
