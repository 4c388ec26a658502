"""MagR: its proximal map, its objective, and what it does to a model."""

from itertools import pairwise

import pytest
import torch
from helpers.models import joined, task_of
from helpers.problems import problem
from torch import Tensor

from qexp.grid import IntGrid
from qexp.transforms.magr import GROUP, ROW, MagR, clip_level, reduce_magnitude


def objective(value: Tensor, weight: Tensor, hessian: Tensor, alpha: float, groups: int) -> float:
    scaled = hessian.double() / torch.linalg.eigvalsh(hessian.double())[-1]
    change = (value - weight).double()
    largest = value.double().abs().unflatten(1, (groups, -1)).amax(2).sum()
    return float((change @ scaled * change).sum() / 2 + alpha * largest)


@pytest.mark.parametrize("total", [1e-3, 0.3, 5.0, 80.0])
def test_the_level_cuts_off_as_much_as_it_should(total: float) -> None:
    weight, _ = problem()
    level = clip_level(weight, total)
    cut = (weight.abs() - level).clamp(min=0).sum(1)
    small = weight.abs().sum(1) <= total
    torch.testing.assert_close(cut[~small], torch.full_like(cut[~small], total), rtol=1e-3, atol=0)
    assert level[small].eq(0).all() and small.any() == (total == 80.0) and not small.all()


@pytest.mark.parametrize("groups", [1, 3])
def test_no_step_raises_the_objective_or_a_largest_weight(groups: int) -> None:
    weight, hessian = problem()
    values = [reduce_magnitude(weight, hessian, 0.05, steps, groups) for steps in range(0, 12, 2)]
    found = [objective(value, weight, hessian, 0.05, groups) for value in values]
    assert all(b <= a * (1 + 1e-6) for a, b in pairwise(found))
    assert found[-1] < found[0]
    largest = [value.abs().unflatten(1, (groups, -1)).amax(2) for value in values]
    assert (largest[-1] <= largest[0]).all() and (largest[-1] < largest[0]).any()


def test_without_alpha_nothing_changes() -> None:
    weight, hessian = problem()
    assert torch.equal(reduce_magnitude(weight, hessian, 0.0, 20), weight)


def test_an_identity_hessian_clips_each_row_once() -> None:
    weight, _ = problem()
    level = clip_level(weight, 0.5)
    ours = reduce_magnitude(weight, torch.eye(96), 0.5, 7)
    torch.testing.assert_close(ours, weight.clamp(-level, level))


@pytest.mark.parametrize("size", [None, 32])
def test_alpha_follows_the_grid_and_later_layers_see_earlier_changes(size: int | None) -> None:
    grid = IntGrid(3, group_size=size)
    changed, given, plain = task_of("llama"), task_of("llama"), task_of("llama")
    MagR(grid, steps=5)(changed, lambda: [joined("llama")])
    MagR(grid, ROW if size is None else GROUP, 5)(given, lambda: [joined("llama")])
    for one, two in zip(changed.parameters(), given.parameters(), strict=True):
        assert torch.equal(one, two)
    linears = plain.linears()
    for name, linear in changed.linears().items():
        assert linear.weight.abs().max() < linears[name].weight.abs().max()
