"""GPTQ: identities, the explicit-inverse derivation, and what storage says."""

from dataclasses import replace

import pytest
import torch
from helpers.problems import SECOND, is_stored_whole, loss, problem
from helpers.reference.obq import obq
from torch import Tensor

from qexp.common.errors import UserError
from qexp.grid import Grid, IntGrid, LevelGrid
from qexp.grid.ranges import Percentile
from qexp.packed.bitpacking import pack_bits
from qexp.solvers import GPTQ
from qexp.solvers.rtn import RTN

GRIDS: dict[str, Grid] = {
    "row": IntGrid(3),
    "symmetric": IntGrid(3, symmetric=True, scale_dtype="float16"),
    "groups": IntGrid(4, group_size=32, scale_dtype="float16"),
    "tensor": IntGrid(4, per_tensor=True),
    "nf4": LevelGrid("nf4", group_size=32),
    "two-level": IntGrid(
        3, group_size=16, include_zero=False, real_zero=True, scales=SECOND, zeros=SECOND
    ),
    "scales only": IntGrid(3, group_size=16, symmetric=True, scales=SECOND),
}
ORDERS = {
    "natural": {},
    "act_order": {"act_order": True, "static_groups": True},
    "scattered": {"act_order": True},
}


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_identity_hessian_is_round_to_nearest(grid: Grid) -> None:
    weight, _ = problem()
    solution = GPTQ(grid, damp=0.0)(weight, torch.eye(96))
    assert torch.equal(solution.weight, RTN(grid)(weight).weight)


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_block_never_changes_the_result(order: dict) -> None:
    weight, hessian = problem()
    grid = IntGrid(3, group_size=32)
    first, *others = (GPTQ(grid, block=b, **order)(weight, hessian) for b in (128, 1, 7, 32))
    for other in others:
        assert (first.weight - other.weight).abs().lt(1e-5).double().mean() > 0.99


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_scale_of_the_hessian_is_free(order: dict) -> None:
    weight, hessian = problem()
    solver = GPTQ(IntGrid(3, group_size=32), **order)
    same = solver(weight, hessian).weight - solver(weight, 1000 * hessian).weight
    assert same.abs().lt(1e-5).double().mean() > 0.99


def test_equals_the_explicit_inverse() -> None:
    weight, hessian = problem(24, 48)
    grid = IntGrid(3)
    q = grid.fit(weight)

    def nearest(values: Tensor, _: int) -> Tensor:
        return grid.round(values[:, None], q)[:, 0]

    reference = obq(weight, hessian, 0.01, nearest)
    ours = GPTQ(grid, damp=0.01)(weight, hessian).weight
    assert (ours - reference).abs().lt(1e-5).double().mean() > 0.99
    assert loss(ours - weight, hessian) == pytest.approx(
        loss(reference - weight, hessian), rel=1e-3
    )


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_storage_is_exact_and_costs_what_it_says(grid: Grid, order: dict) -> None:
    weight, hessian = problem()
    solution = GPTQ(grid, **order)(weight, hessian)
    assert is_stored_whole(solution)
    scattered = order == ORDERS["scattered"] and grid.group_size is not None
    index = 16 * 96 / weight.numel() if scattered else 0
    assert solution.bits == pytest.approx(grid.cost(48, 96) + index)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_beats_round_to_nearest(grid: Grid) -> None:
    weight, hessian = problem()
    solver = GPTQ(grid)
    nearest = solver.baseline(weight, hessian).weight
    ours = solver(weight, hessian).weight
    assert loss(ours - weight, hessian) < loss(nearest - weight, hessian)


def test_stacked_rows_are_solved_alone() -> None:
    weight, hessian = problem()
    solver = GPTQ(IntGrid(3, group_size=32), act_order=True, static_groups=True)
    assert solver.rowwise
    whole = solver(weight, hessian)
    part = solver(weight[16:32], hessian)
    assert (whole.weight[16:32] - part.weight).abs().lt(1e-5).double().mean() > 0.99
    assert torch.equal(whole.packed.rows(16, 32).dequantize(), whole.weight[16:32])


def test_a_group_size_that_does_not_divide_is_named() -> None:
    with pytest.raises(UserError, match="group_size=5 does not divide the 96 inputs"):
        GPTQ(IntGrid(3, group_size=5)).check(48, 96)
    level = IntGrid(3, group_size=32)
    with pytest.raises(UserError, match=r"scales\.group_size=32 does not divide the 48 outputs"):
        GPTQ(IntGrid(3, scales=level)).check(48, 96)


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_codes_of_few_bits_fill_bytes(bits: int) -> None:
    assert pack_bits(torch.zeros(3, 5, dtype=torch.int32), bits).numel() == -(-15 * bits // 8)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("grid", [IntGrid(3), IntGrid(3, group_size=24)], ids=str)
def test_backwards_is_the_sweep_of_the_mirrored_matrix(grid: IntGrid, static: bool) -> None:
    weight, hessian = problem()
    solver = GPTQ(grid, static_groups=static, fit_every=1)
    mirrored = solver(weight.flip(1), hessian.flip(0, 1)).weight.flip(1)
    solution = replace(solver, backwards=True)(weight, hessian)
    torch.testing.assert_close(solution.weight, mirrored)
    assert is_stored_whole(solution)


def test_what_is_clipped_first_is_not_compensated() -> None:
    weight, hessian = problem()
    grid = IntGrid(3, range=Percentile(90.0))
    solver = GPTQ(grid, static_groups=True, clip_first=True)
    q = grid.scales_of(weight)
    clipped = grid.clip(weight, q)
    assert not torch.equal(clipped, weight)
    ours, plain = (
        replace(solver, clip_first=first)(weight, hessian).weight for first in (True, False)
    )
    assert loss(ours - clipped, hessian) < loss(plain - clipped, hessian)
    assert loss(plain - weight, hessian) < loss(ours - weight, hessian)
    with pytest.raises(UserError, match=r"clip_first=true.*static_groups=true"):
        GPTQ(grid, clip_first=True)
