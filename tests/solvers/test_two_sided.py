"""YAQA's rounding, which is GPTQ in a Kronecker product, and solvers by groups of rows."""

import pytest
import torch
from helpers.problems import is_stored_whole, problem
from torch import Tensor

from qexp.common.errors import UserError
from qexp.grid import IntGrid
from qexp.packed import weights_file
from qexp.solvers import GPTQ, LNQ, RTN, BiLLM, Solver, SqueezeLLM, TwoSided
from qexp.solvers.base import Moments
from qexp.solvers.both_sides import joined, sides
from qexp.solvers.by_rows import ByRows
from qexp.solvers.factor import inverse_factor
from qexp.solvers.low_rank import Correction
from qexp.solvers.two_sided import antidiagonal_sweep
from qexp.solvers.wrapper import OfDiagonal

GRID = IntGrid(3, group_size=16, scale_dtype="float16")
ONE = IntGrid(3, per_tensor=True)


def both(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight and the Hessians of its inputs and outputs."""
    weight, inputs = problem(rows, columns, seed)
    return weight, inputs, problem(rows, rows, seed + 1)[1]


def test_the_sides_come_back_as_views() -> None:
    _, inputs, outputs = both(5, 7)
    whole = joined(inputs, outputs)
    one, two = sides(whole, 7)
    assert torch.equal(one, inputs) and torch.equal(two, outputs)
    one[0, 0] = 42
    assert whole[0] == 42


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("block", [2, 128])
def test_it_is_gptq_on_the_weights_as_one_row(seed: int, block: int) -> None:
    weight, inputs, outputs = both(5, 7, seed)
    ours = TwoSided(ONE, damp=0.0, block=block)(weight, joined(inputs, outputs)).weight
    kronecker = torch.kron(outputs, inputs)
    vector = GPTQ(IntGrid(3), damp=0.0)(weight.reshape(1, -1), kronecker).weight
    torch.testing.assert_close(ours, vector.reshape(5, 7))
    assert not torch.equal(ours, RTN(ONE)(weight).weight)


def test_without_an_output_side_it_is_gptq() -> None:
    weight, inputs, _ = both(48, 96)
    for settings in ({"act_order": False}, {"act_order": True}):
        ours = TwoSided(GRID, **settings)(weight, joined(inputs, torch.eye(48)))
        gptq = GPTQ(GRID, static_groups=True, **settings)(weight, inputs)
        assert torch.equal(ours.weight, gptq.weight) and ours.bits == gptq.bits
        assert is_stored_whole(ours)


def test_without_an_input_side_it_is_gptq_of_the_transposed_matrix() -> None:
    weight, _, outputs = both(48, 96)
    ours = TwoSided(ONE)(weight, joined(torch.eye(96), outputs)).weight
    other = GPTQ(ONE, static_groups=True)(weight.T.contiguous(), outputs).weight
    assert torch.equal(ours, other.T)


def row_by_row(weight: Tensor, inputs: Tensor, outputs: Tensor, step: float) -> Tensor:
    """One row after another: GPTQ along it, then its errors to the rows below."""
    right, left = (inverse_factor(each, 0.0).upper for each in (inputs, outputs))
    rest, out = weight.clone(), torch.empty_like(weight)
    for i in range(len(rest)):
        errors = torch.zeros(rest.shape[1])
        for j in range(rest.shape[1]):
            out[i, j] = (rest[i, j] / step).round() * step
            errors[j] = (rest[i, j] - out[i, j]) / right[j, j]
            rest[i, j + 1 :] -= errors[j] * right[j, j + 1 :]
        rest[i + 1 :] -= torch.outer(left[i, i + 1 :] / left[i, i], errors @ right)
    return out


@pytest.mark.parametrize("block", [1, 3, 8, 128])
def test_antidiagonals_and_tiles_are_the_rows_in_turn(block: int) -> None:
    weight, inputs, outputs = both(11, 13)
    right, left = (inverse_factor(each, 0.0).upper for each in (inputs, outputs))
    ours = antidiagonal_sweep(weight, left, right, lambda w, *_: (w * 2).round() / 2, block)
    torch.testing.assert_close(ours, row_by_row(weight, inputs, outputs, 0.5))


def test_the_error_in_both_sides_falls_below_that_of_gptq() -> None:
    weight, inputs, outputs = both(48, 96)
    solver, hessian = TwoSided(GRID), joined(inputs, outputs)
    kronecker = torch.kron(outputs.double(), inputs.double())
    errors = {}
    for name, found in {
        "ours": solver(weight, hessian),
        "gptq": GPTQ(GRID, static_groups=True)(weight, inputs),
        "nearest": RTN(GRID)(weight),
    }.items():
        change = found.weight - weight
        errors[name] = solver.measure(change, hessian)
        flat = change.double().flatten()
        assert errors[name] == pytest.approx(float(flat @ kronecker @ flat), rel=1e-3)
    assert errors["ours"] < 0.9 * errors["gptq"] < errors["nearest"]


def test_one_group_of_rows_is_the_solver_itself() -> None:
    weight, hessian = problem()
    solver = GPTQ(GRID)
    ours, plain = ByRows(solver, 1)(weight, hessian[None]), solver(weight, hessian)
    assert torch.equal(ours.weight, plain.weight) and ours.bits == plain.bits


@pytest.mark.parametrize(
    "solver",
    [
        GPTQ(GRID, act_order=True),
        BiLLM(block=40, scale_dtype="float16"),
        LNQ(2),
        OfDiagonal(SqueezeLLM(2, outliers=0.01)),
    ],
    ids=str,
)
def test_each_group_of_rows_is_solved_in_its_own_hessian(solver, tmp_path) -> None:
    weight, _ = problem()
    hessians = torch.stack([problem(seed=seed)[1] for seed in (1, 2, 3)])
    ours = ByRows(solver, 3)(weight, hessians)
    parts = [solver(weight[16 * n : 16 * n + 16], hessians[n]) for n in range(3)]
    assert torch.equal(ours.weight, torch.cat([part.weight for part in parts]))
    assert ours.bits == pytest.approx(sum(part.bits for part in parts) / 3)
    assert is_stored_whole(ours)
    assert torch.equal(ours.packed.rows(10, 40).dequantize(), ours.weight[10:40])
    weights_file.save(tmp_path, {"layer": ours.packed}, {})
    assert torch.equal(weights_file.load(tmp_path)[0]["layer"].dequantize(), ours.weight)
    change = ours.weight - weight
    own = sum(solver.measure(change[16 * n : 16 * n + 16], hessians[n]) for n in range(3))
    assert ByRows(solver, 3).measure(change, hessians) == pytest.approx(own)


def test_each_group_of_rows_has_a_correction_of_its_own() -> None:
    weight, _ = problem()
    hessians = torch.stack([problem(seed=seed)[1] for seed in (1, 2, 3)])
    solver = Correction(0.25).around(GPTQ(GRID))
    ours = ByRows(solver, 3)(weight, hessians)
    for n in range(3):
        rows = slice(16 * n, 16 * n + 16)
        assert torch.equal(ours.weight[rows], solver(weight[rows], hessians[n]).weight)
    assert is_stored_whole(ours)
    with pytest.raises(UserError, match=r"method\.residual\.rank=0\.25: TwoSided rounds in a Hess"):
        Correction(0.25).around(TwoSided(GRID))


def test_groups_of_rows_are_handed_what_the_solver_needs() -> None:
    weight, hessian = problem()
    moments, first = Moments(hessian, 1.1 * hessian), weight + 0.1
    solver: Solver = GPTQ(GRID, carry=0.5)
    ours = ByRows(solver, 3)
    assert ours.needs_moments and ours.takes_first
    assert ours.least_bits(48, 96) == solver.least_bits(16, 96)
    assert ours.with_bits(2) == ByRows(solver.with_bits(2), 3)
    torch.testing.assert_close(ours.aim(weight, moments), solver.aim(weight, moments))
    together = solver(weight, hessian, moments=moments, first=first)
    rows = ours(weight, hessian.expand(3, -1, -1), moments=moments, first=first)
    assert torch.equal(rows.weight, together.weight)
    assert not torch.equal(rows.weight, solver(weight, hessian, moments=moments).weight)


def test_groups_must_divide_the_rows() -> None:
    with pytest.raises(UserError, match=r"^method\.hessian\.groups=5 does not divide the 48"):
        ByRows(GPTQ(GRID), 5).check(48, 96)
    with pytest.raises(UserError, match=r"weight\.group_size"):
        ByRows(GPTQ(GRID), 4).check(48, 90)
