"""QuIP: LDLQ is the sweep, rotations are orthogonal and come back from their seed, storage."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from helpers.problems import is_stored_whole, loss, problem
from helpers.reference.ldlq import ldlq
from torch import Tensor

from qexp.grid import IntGrid
from qexp.grid.ranges import RMS
from qexp.packed.rotated import Rotated, Rotation
from qexp.solvers import GPTQ
from qexp.solvers.quip import QuIP
from qexp.solvers.sweep import descend


def grid(bits: int) -> IntGrid:
    return IntGrid(
        bits,
        per_tensor=True,
        include_zero=False,
        real_zero=True,
        range=RMS(),
        scale_dtype="float16",
    )


def test_ldlq_is_gptqs_sweep() -> None:
    weight, hessian = problem(24, 48)
    places = grid(3)
    q = places.fit(weight)

    def nearest(values: Tensor) -> Tensor:
        return places.round(values[:, None], q)[:, 0]

    ours = GPTQ(places, damp=0.0)(weight, hessian).weight
    reference = ldlq(weight, hessian, nearest)
    assert (ours - reference).abs().lt(1e-5).double().mean() > 0.99


@pytest.mark.parametrize("length", [1, 7, 48, 96, 576])
def test_rotations_are_orthogonal_and_undone(length: int) -> None:
    rotation = Rotation.random(length, torch.Generator().manual_seed(3))
    matrix = rotation.apply(torch.eye(length))
    identity = torch.eye(length, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, identity)
    torch.testing.assert_close(rotation.undo(matrix), identity)


def test_the_objective_is_that_of_the_rotated_problem() -> None:
    # fine codes: the error is the grid's, so it shows that W and H were turned alike
    weight, hessian = problem()
    solution = QuIP(grid(8))(weight, hessian)
    unturned = QuIP(grid(8), rescale=False)(weight, hessian)
    total = loss(weight, hessian)
    assert loss(solution.weight - weight, hessian) < 1e-2 * total
    assert loss(unturned.weight - weight, hessian) < 1e-2 * total


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_beats_rounding_after_rotation_and_plain_sweep(bits: int) -> None:
    weight, hessian = problem()
    solver = QuIP(grid(bits))
    ours = loss(solver(weight, hessian).weight - weight, hessian)
    assert ours < loss(solver.baseline(weight, hessian).weight - weight, hessian)
    plain = GPTQ(grid(bits), act_order=True)(weight, hessian).weight
    assert ours < loss(plain - weight, hessian)


def best_moves(weight: Tensor, rounded: Tensor, hessian: Tensor, values: Tensor) -> Tensor:
    """A greedy pass as it reads: every value tried at every place, the last column first."""
    rounded = rounded.clone()
    for column in reversed(range(weight.shape[1])):
        for row in range(len(weight)):
            tried = rounded[row].repeat(len(values), 1)
            tried[:, column] = values
            change = (tried - weight[row]).double()
            rounded[row] = tried[((change @ hessian.double()) * change).sum(1).argmin()]
    return rounded


@pytest.mark.parametrize("block", [5, 128])
def test_a_greedy_pass_takes_the_best_value_of_each_weight_in_turn(block: int) -> None:
    weight, hessian = problem(12, 24)
    places = grid(2)
    q = places.fit(weight)
    start = places.round(weight, q)

    def nearest(values: Tensor, _: int) -> Tensor:
        return places.round(values[:, None], q)[:, 0]

    ours = descend(weight, start, hessian, nearest, block)
    values = places.decode(torch.arange(4.0)[None], q).flatten()
    reference = best_moves(weight, start, hessian, values)
    assert (ours - reference).abs().lt(1e-5).double().mean() > 0.99
    assert loss(ours - weight, hessian) < 0.9 * loss(start - weight, hessian)


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("start", [{}, {"act_order": True}], ids=str)
def test_greedy_passes_never_make_the_objective_greater(bits: int, start: dict) -> None:
    for seed in range(3):
        weight, hessian = problem(seed=seed)
        solver = QuIP(grid(bits), **start)
        errors = [
            loss(replace(solver, greedy=n)(weight, hessian).weight - weight, hessian)
            for n in (0, 1, 2, 9)
        ]
        assert errors[1] < errors[0]
        assert all(b <= a * (1 + 1e-5) for a, b in pairwise(errors))


def test_greedy_passes_keep_the_scales_and_the_places_of_unseen_inputs() -> None:
    weight, hessian = problem()
    hessian[:, 7] = hessian[7] = 0
    for places in (grid(3), IntGrid(3, group_size=32, scale_dtype="float16")):
        plain = QuIP(places, act_order=True)(weight, hessian).packed
        greedy = QuIP(places, act_order=True, greedy=2)(weight, hessian)
        assert isinstance(greedy.packed, Rotated) and isinstance(plain, Rotated)
        assert torch.equal(plain.inner.scales().scale, greedy.packed.inner.scales().scale)
        assert greedy.bits == plain.bits() and greedy.weight.isfinite().all()
        restored = Rotated.restore(greedy.packed.stored(), greedy.packed.layout())
        assert torch.equal(greedy.weight, restored.dequantize())


def test_the_baseline_is_rounding_after_rotation() -> None:
    weight, _ = problem()
    assert QuIP(grid(3), greedy=3).baseline == QuIP(grid(3), feedback=False)
    identity = QuIP(grid(3), rescale=False, greedy=3)(weight, torch.eye(96)).weight
    nearest = QuIP(grid(3), rescale=False, feedback=False)(weight, torch.eye(96)).weight
    torch.testing.assert_close(identity, nearest)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("places", [grid(2), IntGrid(4, group_size=32, scale_dtype="float16")])
def test_storage_is_exact_and_complete(rescale: bool, feedback: bool, places: IntGrid) -> None:
    weight, hessian = problem()
    solution = QuIP(places, rescale=rescale, feedback=feedback, seed=5)(weight, hessian)
    assert is_stored_whole(solution)
    extra = (16 * 96 + 64) / weight.numel()
    assert solution.bits == pytest.approx(places.cost(48, 96) + extra)


def test_scale_of_the_hessian_is_free_and_the_seed_is_not() -> None:
    weight, hessian = problem()
    solver = QuIP(grid(3))
    ours = solver(weight, hessian).weight
    other = solver(weight, 1000 * hessian).weight
    assert (ours - other).abs().lt(1e-4).double().mean() > 0.95
    assert not torch.equal(ours, replace(solver, seed=1)(weight, hessian).weight)


def test_unseen_inputs_are_harmless() -> None:
    weight, hessian = problem()
    hessian[:, 7] = hessian[7] = 0
    rounded = QuIP(grid(4))(weight, hessian).weight
    assert rounded.isfinite().all()
    assert loss(rounded - weight, hessian) < 0.1 * loss(weight, hessian)
