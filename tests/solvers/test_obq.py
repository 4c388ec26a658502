"""OBQ: identities, its loss, and its orders."""

import pytest
import torch
from helpers.problems import is_stored_whole, loss, problem
from torch import Tensor

from qexp.common.errors import UserError
from qexp.grid import Grid, IntGrid, LevelGrid
from qexp.grid.ranges import MSE, Percentile
from qexp.solvers import GPTQ, OBQ, RTN
from qexp.solvers.factor import damped
from qexp.solvers.obq import cheapest, greedy

GRIDS: dict[str, Grid] = {
    "row": IntGrid(3, scale_dtype="float16"),
    "groups": IntGrid(4, group_size=24, scale_dtype="float16"),
    "symmetric": IntGrid(3, symmetric=True, range=MSE()),
    "nf4": LevelGrid("nf4", group_size=24),
}


def doubles(damp: float = 0.01) -> tuple[Tensor, Tensor]:
    weight, hessian = problem(8, 48)
    return weight.double(), damped(hessian.double(), damp)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_a_diagonal_hessian_is_round_to_nearest(grid: Grid) -> None:
    weight, _ = problem(8, 48)
    diagonal = torch.diag(torch.linspace(0.5, 4.0, 48))
    assert torch.equal(OBQ(grid)(weight, diagonal).weight, RTN(grid)(weight).weight)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_storage_is_exact_and_rounding_to_nearest_is_beaten(grid: Grid) -> None:
    weight, hessian = problem(24, 48)
    solution = OBQ(grid, damp=0.01)(weight, hessian)
    assert is_stored_whole(solution)
    assert solution.bits == pytest.approx(grid.cost(24, 48))
    nearest = RTN(grid)(weight).weight
    assert loss(solution.weight - weight, hessian) < 0.8 * loss(nearest - weight, hessian)


def test_the_steps_add_up_to_the_error() -> None:
    """Σ (w - q)² / [H⁻¹]_jj over the steps is tr(Δ H Δᵀ)."""
    weight, hessian = doubles()
    grid = IntGrid(3)
    q = grid.fit(weight.float()).map(lambda part: part.double())
    choose, paid = cheapest(torch.full_like(weight, torch.inf)), []

    def paying(change: Tensor, variance: Tensor, left: Tensor) -> Tensor:
        j = choose(change, variance, left)
        paid.append((change.square() / variance).gather(1, j[:, None]).sum())
        return j

    ours = greedy(weight, hessian.inverse(), lambda values: grid.round(values, q), paying)
    assert float(torch.stack(paid).sum()) == pytest.approx(loss(ours - weight, hessian), rel=1e-6)


def test_the_natural_order_is_gptq() -> None:
    weight, hessian = doubles()
    grid, steps = IntGrid(3), iter(range(48))
    q = grid.fit(weight.float()).map(lambda part: part.double())
    ours = greedy(
        weight,
        hessian.inverse(),
        lambda values: grid.round(values, q),
        lambda change, *_: torch.full((len(change),), next(steps)),
    )
    expected = GPTQ(grid, damp=0.0)(weight.float(), hessian.float()).weight
    assert (ours.float() - expected).abs().lt(1e-5).double().mean() > 0.99


def test_every_row_has_its_own_order_and_none_depends_on_another() -> None:
    weight, hessian = problem(20, 48)
    grid = IntGrid(3)
    whole = OBQ(grid, damp=0.01)(weight, hessian)
    assert OBQ(grid).rowwise
    one = OBQ(grid, damp=0.01, rows=1)(weight[7:8], hessian)
    assert torch.equal(whole.weight[7:8], one.weight)


def test_what_has_left_its_grid_comes_first() -> None:
    weight, hessian = problem(24, 48)
    grid = IntGrid(3, range=Percentile(95.0))
    ours = [OBQ(grid, 0.01, first)(weight, hessian).weight - weight for first in (True, False)]
    assert not torch.equal(*ours)
    assert loss(ours[0], hessian) < loss(ours[1], hessian)


def test_a_singular_hessian_raises_the_damping() -> None:
    weight, _ = problem(8, 48)
    inputs = torch.randn(20, 48, generator=torch.Generator().manual_seed(0))
    solution = OBQ(IntGrid(3))(weight, inputs.T @ inputs)
    assert solution.damp > 0 and solution.weight.isfinite().all()


def test_a_refit_lowers_the_error() -> None:
    weight, hessian = problem(24, 48)
    metric = damped(hessian, 0.01)
    plain, ours = (OBQ(IntGrid(3), 0.01, refit=refit)(weight, hessian) for refit in (False, True))
    assert loss(ours.weight - weight, metric) < loss(plain.weight - weight, metric)
    with pytest.raises(UserError, match=r"method\.solver\.refit=true"):
        OBQ(IntGrid(3, per_tensor=True), refit=True)
