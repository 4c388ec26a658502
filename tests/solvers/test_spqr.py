"""SpQR: outliers against leave-one-out as it reads, the second level, storage, invariances."""

from dataclasses import replace
from math import inf
from typing import Any

import pytest
import torch
from helpers.problems import TWO_LEVELS, is_stored_whole, loss, problem
from torch import Tensor

from qexp.common.errors import UserError
from qexp.grid import IntGrid
from qexp.packed.coded import Coded
from qexp.solvers import GPTQ, SpQR
from qexp.solvers.rtn import RTN
from qexp.solvers.spqr import filled, gains_alone
from qexp.solvers.sweep import Swept, sweep

VARIANTS = {
    "default": SpQR(TWO_LEVELS, outlier_dtype="float16"),
    "act_order": SpQR(TWO_LEVELS, act_order=True, outlier_dtype="bfloat16"),
    "many outliers": SpQR(TWO_LEVELS, threshold=0.01, outlier_dtype="float16"),
    "no outliers": SpQR(TWO_LEVELS, threshold=inf),
    "one level": SpQR(replace(TWO_LEVELS, scales=None, zeros=None)),
    "zeros whole": SpQR(replace(TWO_LEVELS, real_zero=False, include_zero=True, zeros=None)),
    "scales plain": SpQR(replace(TWO_LEVELS, scales=None)),
}


def one_by_one(values: Tensor, diagonal: Tensor, grid: IntGrid) -> Tensor:
    def error(x: Tensor, d: Tensor) -> Tensor:
        return ((grid.round(x, grid.fit(x)) - x) / d).square().sum(1)

    gains = []
    for index in range(values.shape[1]):
        others = torch.arange(values.shape[1]) != index
        gains.append(error(values, diagonal) - error(values[:, others], diagonal[others]))
    return torch.stack(gains, 1)


def test_leaving_one_out_as_it_reads() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(200, 16, generator=generator)
    values[::3, 5] = values[::3, 2]  # ties
    values[::7, 0] = 20
    values[1] = 0.5
    diagonal = torch.rand(16, generator=generator) + 0.5
    grid = IntGrid(3, include_zero=False, real_zero=True)
    expected = one_by_one(values, diagonal, grid)
    torch.testing.assert_close(gains_alone(values, diagonal, grid), expected, rtol=1e-4, atol=1e-4)


def test_outliers_are_replaced_by_the_mean_of_the_others() -> None:
    values = torch.tensor([[1.0, 2.0, 9.0], [4.0, 5.0, 6.0]])
    mask = torch.tensor([[False, False, True], [True, True, True]])
    expected = torch.tensor([[1.0, 2.0, 1.5], [0.0, 0.0, 0.0]])
    assert torch.equal(filled(values, mask), expected)


@pytest.mark.parametrize("solver", VARIANTS.values(), ids=VARIANTS)
def test_storage_is_exact_and_complete(solver: SpQR) -> None:
    weight, hessian = problem()
    solution = solver(weight, hessian)
    packed = solution.packed
    assert isinstance(packed, Coded)
    assert is_stored_whole(solution)
    sparse = 0 if packed.outliers is None else packed.outliers.size()
    order = 16 * 96 if solver.act_order else 0
    expected = solver.grid.cost(48, 96) + (sparse + order) / weight.numel()
    assert solution.bits == pytest.approx(expected)


@pytest.mark.parametrize("solver", VARIANTS.values(), ids=VARIANTS)
def test_better_than_round_to_nearest(solver: SpQR) -> None:
    weight, hessian = problem()
    nearest = RTN(solver.grid)(weight).weight
    ours = solver(weight, hessian).weight
    assert loss(ours - weight, hessian) < loss(nearest - weight, hessian)


@pytest.mark.parametrize("solver", VARIANTS.values(), ids=VARIANTS)
def test_errors_are_spread_from_the_values_that_storage_gives(
    solver: SpQR, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def watched(*args: Any) -> Swept:
        seen.append(sweep(*args))
        return seen[0]

    monkeypatch.setattr("qexp.solvers.spqr.sweep", watched)
    weight, hessian = problem()
    solution = solver(weight, hessian)
    order = torch.argsort(hessian.diagonal(), descending=True) if solver.act_order else slice(None)
    assert torch.equal(seen[0].rounded, solution.weight[:, order])


def test_outliers_help_and_infinity_is_gptq() -> None:
    weight, hessian = problem()
    grid = IntGrid(3, group_size=16)
    plain = SpQR(grid, threshold=inf)(weight, hessian)
    assert torch.equal(plain.weight, GPTQ(grid, fit_every=1)(weight, hessian).weight)
    sparse = SpQR(grid, threshold=0.2)(weight, hessian)
    assert loss(sparse.weight - weight, hessian) < 0.8 * loss(plain.weight - weight, hessian)


@pytest.mark.parametrize("act_order", [False, True])
def test_scale_of_the_hessian_and_block_are_free(act_order: bool) -> None:
    weight, hessian = problem()
    solver = SpQR(TWO_LEVELS, act_order=act_order)
    ours = solver(weight, hessian).weight
    # powers of two: rounding is the same too, and two coarse levels amplify nothing
    assert torch.equal(ours, solver(weight, 1024 * hessian).weight)
    blocks = replace(solver, block=48)(weight, hessian).weight
    assert (ours - blocks).abs().lt(1e-5).double().mean() > 0.95


def test_unseen_inputs_are_set_to_zero() -> None:
    weight, hessian = problem()
    hessian[:, 7] = hessian[7] = 0
    rounded = SpQR(IntGrid(4), threshold=inf)(weight, hessian).weight
    assert rounded[:, 7].abs().max() == 0


def test_bits_as_the_paper_counts_them() -> None:
    weight, hessian = problem(64, 96)
    real = SpQR(TWO_LEVELS, threshold=inf)(weight, hessian)
    assert real.paper_bits == 3 + 6 / 16 + 64 / 256
    whole = SpQR(replace(TWO_LEVELS, real_zero=False, zeros=None), threshold=inf)(weight, hessian)
    assert whole.paper_bits == 3 + (3 + 3) / 16 + 32 / 256
    sparse = SpQR(TWO_LEVELS)(weight, hessian)
    assert isinstance(sparse.packed, Coded) and sparse.packed.outliers is not None
    share = len(sparse.packed.outliers.values) / weight.numel()
    assert sparse.paper_bits == pytest.approx(3.625 + 32 * share)
    assert sparse.bits > sparse.paper_bits


def test_wrong_settings_are_named() -> None:
    with pytest.raises(UserError, match=r"method\.solver\.threshold=-1"):
        SpQR(TWO_LEVELS, threshold=-1.0)
    with pytest.raises(UserError, match="outlier_dtype=int8"):
        SpQR(TWO_LEVELS, outlier_dtype="int8")
    with pytest.raises(UserError, match="does not divide the 40 outputs"):
        SpQR(TWO_LEVELS).check(40, 96)
