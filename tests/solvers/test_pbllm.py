"""PB-LLM: who is salient, what the others become, storage, invariances."""

from dataclasses import replace

import pytest
import torch
from helpers.problems import is_stored_whole, loss, problem

from qexp.common.errors import UserError
from qexp.grid import IntGrid
from qexp.packed.mixed import Partial
from qexp.solvers.pbllm import PBLLM

EIGHT = IntGrid(8, scale_dtype="float16")
VARIANTS = {
    "default": PBLLM(),
    "groups": PBLLM(EIGHT, group_size=24, scale_dtype="float16"),
    "magnitude": PBLLM(salient_metric="magnitude", scale_dtype="bfloat16"),
    "none salient": PBLLM(salient=0.0),
    "half": PBLLM(EIGHT, salient=0.5),
}


@pytest.mark.parametrize("solver", VARIANTS.values(), ids=VARIANTS)
def test_storage_is_exact_and_complete(solver: PBLLM) -> None:
    weight, hessian = problem()
    solution = solver(weight, hessian)
    packed = solution.packed
    assert isinstance(packed, Partial)
    assert is_stored_whole(solution)
    assert torch.equal(packed.rows(3, 9).dequantize(), solution.weight[3:9])
    share = float(packed.salient.float().mean())
    assert share == pytest.approx(solver.salient, abs=1e-3)
    assert solution.paper_bits == pytest.approx(1 + 7 * share)


def test_salient_weights_are_the_largest() -> None:
    weight, hessian = problem()
    packed = PBLLM(salient_metric="magnitude")(weight, hessian).packed
    assert isinstance(packed, Partial)
    assert weight.abs()[packed.salient].min() > weight.abs()[~packed.salient].max()


def test_without_feedback_every_weight_is_rounded_alone() -> None:
    weight, hessian = problem()
    solution = PBLLM(feedback=False)(weight, hessian)
    assert isinstance(solution.packed, Partial)
    salient = solution.packed.salient
    eight = IntGrid(8)(weight)
    for row in range(3):
        low = ~salient[row]
        mean = weight[row, low].mean()
        reach = (weight[row, low] - mean).abs().mean()
        two = torch.where(weight[row] >= mean, mean + reach, mean - reach)
        expected = torch.where(salient[row], eight[row], two)
        torch.testing.assert_close(solution.weight[row], expected)


@pytest.mark.parametrize("solver", VARIANTS.values(), ids=VARIANTS)
def test_better_than_plain_binarization(solver: PBLLM) -> None:
    weight, hessian = problem()
    ours = solver(weight, hessian).weight
    for other in (solver.baseline, replace(solver, feedback=False)):
        nearest = other(weight, hessian).weight
        assert loss(ours - weight, hessian) < loss(nearest - weight, hessian)


def test_scale_of_the_hessian_and_block_are_free() -> None:
    weight, hessian = problem()
    solver = PBLLM()
    ours = solver(weight, hessian).weight
    for other in (solver(weight, 1000 * hessian), replace(solver, block=16)(weight, hessian)):
        assert (ours - other.weight).abs().lt(1e-4).double().mean() > 0.98


def test_wrong_settings_are_named() -> None:
    with pytest.raises(UserError, match=r"method\.solver\.salient=1\.5"):
        PBLLM(salient=1.5)
    with pytest.raises(UserError, match="group_size=7 does not divide the 96 inputs"):
        PBLLM(group_size=7).check(48, 96)


def test_ties_do_not_exceed_the_share() -> None:
    weight, hessian = problem()
    weight[:, :40] = 3.0  # more than a tenth tie at the threshold
    packed = PBLLM(salient_metric="magnitude")(weight, hessian).packed
    assert isinstance(packed, Partial)
    assert torch.equal(packed.salient, weight.abs() > 3)


def test_salient_weights_count_as_zeros_where_asked() -> None:
    weight, hessian = problem()
    solution = PBLLM(feedback=False, salient_as_zeros=True)(weight, hessian)
    assert isinstance(solution.packed, Partial)
    salient = solution.packed.salient
    kept = weight.masked_fill(salient, 0)
    mean = kept.mean(1, keepdim=True)
    reach = (kept - mean).abs().mean(1, keepdim=True)
    two = torch.where(weight >= mean, mean + reach, mean - reach)
    torch.testing.assert_close(solution.weight[~salient], two[~salient])
