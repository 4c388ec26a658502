"""SparseGPT: who is pruned, identities, storage; and AdpQ's outliers."""

from dataclasses import replace

import pytest
import torch
from helpers.problems import is_stored_whole, loss, problem

from qexp.common.errors import UserError
from qexp.grid import IntGrid
from qexp.packed.masked import Masked
from qexp.solvers import GPTQ, RTN
from qexp.solvers.adpq import AdpQ
from qexp.solvers.sparse import SCORES, SparseGPT

FOUR = IntGrid(4, scale_dtype="float16")
ALONE = SparseGPT(None, block=32, dtype="float32")
WANDA = SparseGPT(None, score="wanda", update=False, per_row=True, block=None, dtype="float32")


@pytest.mark.parametrize("grid", [FOUR, IntGrid(3, group_size=32)], ids=str)
def test_nothing_pruned_is_gptq_with_static_groups(grid: IntGrid) -> None:
    weight, hessian = problem()
    ours = SparseGPT(grid, sparsity=0, block=32)(weight, hessian).weight
    theirs = GPTQ(grid, static_groups=True)(weight, hessian).weight
    assert (ours - theirs).abs().lt(1e-5).double().mean() > 0.99


@pytest.mark.parametrize("score", SCORES)
def test_in_uncorrelated_inputs_every_score_is_magnitude(score: str) -> None:
    weight, _ = problem()
    ours = replace(ALONE, score=score, damp=0.0)(weight, torch.eye(96)).weight
    for block, pruned in zip(weight.split(32, 1), ours.split(32, 1), strict=True):
        threshold = block.abs().flatten().sort().values[block.numel() // 2]
        torch.testing.assert_close(pruned, torch.where(block.abs() < threshold, 0, block))


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.85])
def test_the_share_of_zeros_is_exact_in_every_block(sparsity: float) -> None:
    weight, hessian = problem()
    packed = replace(ALONE, sparsity=sparsity)(weight, hessian).packed
    assert isinstance(packed, Masked)
    for block in packed.mask.split(32, 1):
        assert int((~block).sum()) == round(sparsity * block.numel())
    by_row = replace(ALONE, sparsity=sparsity, per_row=True)(weight, hessian).packed
    assert isinstance(by_row, Masked)
    assert ((~by_row.mask).view(48, 3, 32).sum(2) == round(sparsity * 32)).all()


@pytest.mark.parametrize(("pattern", "grid"), [((2, 4), None), ([1, 4], FOUR), ([4, 8], FOUR)])
def test_a_pattern_holds_in_every_row(pattern: list[int], grid: IntGrid | None) -> None:
    weight, hessian = problem()
    solver = SparseGPT(grid, pattern=pattern)
    solution = solver(weight, hessian)
    assert isinstance(solution.packed, Masked)
    kept = solution.packed.mask.view(48, -1, pattern[1])
    assert (kept.sum(2) == pattern[0]).all()
    assert (solution.weight[~solution.packed.mask] == 0).all()
    assert solver.rowwise
    torch.testing.assert_close(solver(weight[8:24], hessian).weight, solution.weight[8:24])


def test_wanda_is_its_formula() -> None:
    weight, hessian = problem()
    ours = WANDA(weight, hessian).weight
    score = weight.abs() * hessian.diagonal().sqrt()
    lowest = score.argsort(1)[:, :48]
    torch.testing.assert_close(ours, weight.scatter(1, lowest, 0))


@pytest.mark.parametrize("grid", [None, FOUR, IntGrid(4, group_size=32)], ids=str)
def test_the_order_of_errors(grid: IntGrid | None) -> None:
    """Means over layers whose inputs differ in size: SparseGPT < Wanda < magnitude."""
    totals = torch.zeros(3)
    solver = SparseGPT(grid, dtype="float32")
    plain = replace(WANDA, grid=grid)
    for seed in range(5):
        weight, hessian = problem(seed=seed)
        sizes = torch.linspace(0.3, 3, 96)
        hessian = hessian * sizes * sizes[:, None]
        for index, each in enumerate((solver, plain, replace(plain, score="magnitude"))):
            totals[index] += loss(each(weight, hessian).weight - weight, hessian)
    assert totals.tolist() == sorted(totals.tolist())
    assert solver.baseline == replace(solver, score="magnitude", update=False)


@pytest.mark.parametrize("sparsity", [0.25, 0.5])
def test_bits_are_those_of_the_formula(sparsity: float) -> None:
    weight, hessian = problem()
    solution = SparseGPT(FOUR, sparsity=sparsity)(weight, hessian)
    assert solution.bits == pytest.approx(1 + 4 * (1 - sparsity) + 20 / 96)
    assert solution.paper_bits == pytest.approx(1 + 4 * (1 - sparsity))
    alone = SparseGPT(None, sparsity=sparsity)(weight, hessian)
    assert alone.bits == pytest.approx(1 + 16 * (1 - sparsity))
    assert is_stored_whole(solution) and is_stored_whole(alone)


def test_kept_weights_take_part_in_the_sweep() -> None:
    """A weight after a pruned one makes up for it."""
    weight, hessian = problem()
    solution = ALONE(weight, hessian)
    assert isinstance(solution.packed, Masked)
    kept = solution.packed.mask
    assert (solution.weight[kept] != weight[kept]).double().mean() > 0.9
    still = replace(ALONE, update=False)(weight, hessian)
    assert isinstance(still.packed, Masked)
    assert torch.equal(still.weight[still.packed.mask], weight[still.packed.mask])


def test_what_cannot_be_is_refused() -> None:
    for wrong in (
        {"sparsity": 1.0},
        {"sparsity": -0.1},
        {"score": "saliency"},
        {"block": 0},
        {"damp": -1.0},
        {"dtype": "int8"},
        {"pattern": [4, 2]},
        {"pattern": [0, 2]},
        {"pattern": [2, 4, 8]},
    ):
        with pytest.raises(UserError, match=rf"method\.solver\.{next(iter(wrong))}="):
            SparseGPT(None, **wrong)
    with pytest.raises(UserError, match=r"pattern=\[2, 7\] does not divide the 96 inputs"):
        SparseGPT(None, pattern=[2, 7]).check(48, 96)
    with pytest.raises(UserError, match=r"method\.solver\.outliers=1\.0"):
        AdpQ(FOUR, outliers=1.0)


SYMMETRIC = IntGrid(4, symmetric=True, group_size=32, scale_dtype="float16")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.08])
def test_adpqs_outliers_are_the_largest_weights(share: float) -> None:
    weight, _ = problem()
    solution = AdpQ(SYMMETRIC, share)(weight)
    packed = solution.packed
    assert isinstance(packed, Masked)
    assert int(packed.mask.sum()) == round(share * weight.numel())
    lasso = torch.quantile(weight.square(), 1 - share)
    assert int((packed.mask != (weight.square() > lasso)).sum()) <= 1
    assert solution.bits == pytest.approx(1 + 4 + 2 * 16 / 32) and is_stored_whole(solution)


def test_adpq_rounds_either_kind_as_if_it_were_alone() -> None:
    weight, _ = problem()
    solution = AdpQ(SYMMETRIC)(weight)
    assert isinstance(solution.packed, Masked)
    mask = solution.packed.mask
    for kept in (mask, ~mask):
        alone = RTN(SYMMETRIC)(weight.masked_fill(~kept, 0)).weight
        assert torch.equal(solution.weight[kept], alone[kept])
    nearest = RTN(SYMMETRIC)(weight).weight
    assert (solution.weight - weight).square().sum() < (nearest - weight).square().sum()
    fine = AdpQ(replace(SYMMETRIC, bits=12, scale_dtype="float32"))(weight).weight
    torch.testing.assert_close(fine, weight, rtol=0, atol=5e-3)
