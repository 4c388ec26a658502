"""BiLLM: both searches against loops over masks, binarization, storage, invariances."""

from dataclasses import replace

import pytest
import torch
from helpers.problems import is_stored_whole, loss, problem
from torch import Tensor

from qexp.common.errors import UserError
from qexp.packed.binary import Binary
from qexp.solvers import BiLLM
from qexp.solvers.billm import Binarize, binarized, jointly
from qexp.solvers.binarization import (
    SPLITS,
    break_point,
    explained_masked,
    explained_sorted,
    quantiles,
    salient_columns,
)
from qexp.solvers.factor import inverse_factor

VARIANTS = {
    "default": BiLLM(block=64),
    "float16": BiLLM(block=32, scale_dtype="float16"),
    "weight": BiLLM(block=64, search="weight", scale_dtype="bfloat16"),
    "block feedback": BiLLM(block=32, feedback="block", damp=0.1),
    "magnitude": BiLLM(block=96, salient_metric="magnitude"),
    "few columns": BiLLM(block=7, most_salient=50),
}


def residual_binarization(values: Tensor, mask: Tensor, order: int) -> Tensor:
    """As the paper has it: mean, sign and mean distance of masked entries, `order` times."""
    done = torch.zeros_like(values)
    for _ in range(order):
        for row in range(len(values)):
            inside = mask[row]
            if inside.any():
                rest = (values - done)[row, inside]
                mean = rest.mean()
                reach = (rest - mean).abs().mean()
                done[row, inside] += mean + reach * (rest - mean).sign()
    return done


def block(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 24, generator=generator, dtype=torch.float32)
    weight[:, 5] *= 4
    weight[:, 11] *= 3
    return weight, (weight / (torch.rand(24, generator=generator) + 0.5)).square()


def test_number_of_salient_columns_as_it_reads() -> None:
    _, importance = block()
    order = importance.sum(0).argsort(descending=True)
    errors = []
    for count in range(1, 20):
        mask = torch.zeros_like(importance, dtype=torch.bool)
        mask[:, order[:count]] = True
        parts = (residual_binarization(importance, part, 2) for part in (mask, ~mask))
        errors.append(float((importance - sum(parts)).square().sum()))
    assert salient_columns(importance[:, order], 20) == 1 + errors.index(min(errors))


@pytest.mark.parametrize("signed", [False, True])
def test_break_point_as_it_reads(signed: bool) -> None:
    weight, importance = block()
    values = weight if signed else importance
    salient = torch.zeros(24, dtype=torch.bool)
    salient[[5, 11]] = True
    magnitude = values.abs().masked_fill(salient, 0)
    splits = torch.quantile(magnitude.flatten(), torch.linspace(0.1, 0.9, SPLITS))
    errors = []
    for split in splits:
        high = (values.abs() > split) & ~salient
        parts = (residual_binarization(values, part, 1) for part in (high, ~(high | salient)))
        errors.append(float((values - sum(parts))[:, ~salient].square().sum()))
    found = break_point(values, values, salient)
    error = min(range(SPLITS), key=lambda index: abs(float(splits[index]) - found))
    assert errors[error] == pytest.approx(min(errors), rel=1e-5)
    kept = explained_sorted(values[:, ~salient], splits)
    masked = explained_masked(values[:, ~salient], values.abs()[:, ~salient], splits)
    torch.testing.assert_close(kept, masked, rtol=1e-5, atol=1e-5)
    total = values[:, ~salient].double().square().sum()
    torch.testing.assert_close(total - kept, torch.tensor(errors).double(), rtol=1e-4, atol=1e-4)


def test_quantiles_are_torchs() -> None:
    values, shares = torch.randn(1001), torch.linspace(0, 1, 37)
    torch.testing.assert_close(quantiles(values, shares), torch.quantile(values, shares))


def test_binarization_is_order_one_and_two() -> None:
    weight, importance = block()
    salient = torch.zeros(24, dtype=torch.bool)
    salient[[5, 11]] = True
    high = (importance > 1) & ~salient
    halves, levels = binarized(weight, high, salient, torch.float32)
    expected = residual_binarization(weight, salient.expand_as(weight), 2)
    expected += residual_binarization(weight, high, 1)
    expected += residual_binarization(weight, ~(high | salient), 1)
    torch.testing.assert_close(halves.decode(levels), expected)


@pytest.mark.parametrize("solver", [*VARIANTS.values(), Binarize(32, "float16")])
def test_storage_is_exact_and_complete(solver: BiLLM | Binarize) -> None:
    weight, hessian = problem()
    solution = solver(weight, hessian)
    packed = solution.packed
    assert isinstance(packed, Binary)
    assert is_stored_whole(solution)
    assert torch.equal(packed.rows(3, 9).dequantize(), solution.weight[3:9])


def test_bits_by_hand() -> None:
    weight, hessian = problem(48, 96)
    solution = BiLLM(block=32, scale_dtype="float16")(weight, hessian)
    assert isinstance(solution.packed, Binary)
    assert solution.packed.halves.salient is not None
    share = float(solution.packed.halves.salient.float().mean())
    assert solution.paper_bits == pytest.approx(1 + share)
    # signs, second signs, group bitmap, column bitmap, seven numbers per row and block
    by_hand = 1 + share + (1 - share) + 1 / 48 + 7 * 16 / 32
    assert solution.bits == pytest.approx(by_hand)


@pytest.mark.parametrize("solver", VARIANTS.values(), ids=VARIANTS)
def test_better_than_plain_binarization(solver: BiLLM) -> None:
    weight, hessian = problem()
    nearest = solver.baseline(weight, hessian).weight
    ours = solver(weight, hessian).weight
    assert loss(ours - weight, hessian) < loss(nearest - weight, hessian)


def test_feedback_between_blocks_helps() -> None:
    weight, hessian = problem()
    solver = BiLLM(block=16)
    ours = solver(weight, hessian).weight
    without = replace(solver, feedback="none")(weight, hessian).weight
    assert loss(ours - weight, hessian) < 0.95 * loss(without - weight, hessian)
    jointly = replace(solver, feedback="block")(weight, hessian).weight
    assert loss(jointly - weight, hessian) < loss(ours - weight, hessian)


def test_joint_feedback_is_the_best_answer_to_a_blocks_errors() -> None:
    _, hessian = problem(24, 48)
    errors = torch.randn(24, 16, generator=torch.Generator().manual_seed(2))
    upper = inverse_factor(hessian, 0.0).upper
    change = -errors @ jointly(upper, 16)[:16, 16:]
    # d/dδ of tr((E, δ) H (E, δ)ᵀ), with E = Q(w) - w = -errors, is zero
    whole = torch.cat([-errors, change], 1)
    slope = (whole @ hessian)[:, 16:]
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-2, rtol=0)


def test_scale_of_the_hessian_is_free() -> None:
    weight, hessian = problem()
    solver = BiLLM(block=32)
    ours = solver(weight, hessian)
    assert torch.equal(ours.weight, solver(weight, 1024 * hessian).weight)
    other = solver(weight, 1000 * hessian).weight
    assert (ours.weight - other).abs().lt(1e-4).double().mean() > 0.99


def test_at_most_eight_values_per_row_and_block() -> None:
    weight, hessian = problem()
    rounded = BiLLM(block=48)(weight, hessian).weight
    for row in rounded:
        assert all(len(part.unique()) <= 8 for part in row.split(48))


def test_unknown_choices_are_named() -> None:
    with pytest.raises(UserError, match=r"method\.solver\.search=both"):
        BiLLM(search="both")
