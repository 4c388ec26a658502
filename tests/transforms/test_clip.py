"""Two-sided clipping: never worse than none, exact where it is searched, and refusals."""

import pytest
import torch
from helpers.models import batches, joined, task_of
from helpers.problems import problem
from torch import Tensor, nn

from qexp.common.errors import UserError
from qexp.grid import Grid, IntGrid, StepGrid
from qexp.grid.ranges import MSE
from qexp.transforms.clip import SHARES, Clip, clipped

GRIDS = [
    IntGrid(2, group_size=32),
    IntGrid(3, symmetric=True),
    IntGrid(3, per_tensor=True),
    StepGrid(3),
]


def linear_of(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(*weight.T.shape, bias=False)
    linear.weight.data = weight.clone()
    return linear


def group_error(made: Tensor, weight: Tensor, moment: Tensor, grid: Grid) -> float:
    """Σ over groups of δᵀ M δ, without what two groups have in common."""
    size = weight.shape[1] // grid.groups(weight.shape[1])
    change = made - weight
    parts = [slice(start, start + size) for start in range(0, weight.shape[1], size)]
    return sum(
        float(((change[:, part] @ moment[part, part]) * change[:, part]).sum()) for part in parts
    )


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_two_sides_are_not_worse_than_one_nor_one_than_none(grid: Grid) -> None:
    weight, moment = problem()
    weight = weight + 0.2
    linear = linear_of(weight)
    errors = [
        group_error(grid(clipped(linear, moment, grid, sides)), weight, moment, grid)
        for sides in ("both", "one")
    ]
    plain = group_error(grid(weight), weight, moment, grid)
    assert errors[0] <= errors[1] * (1 + 1e-5) or not grid.has_zero
    assert max(errors) <= plain * (1 + 1e-5)
    assert errors[0] < 0.97 * plain


def test_the_ends_are_the_best_pair() -> None:
    weight, moment = problem(1, 16)
    grid = IntGrid(2)
    made = clipped(linear_of(weight), moment, grid, "both")
    low, high = weight.min(), weight.max()
    tried = [
        group_error(grid(weight.clamp(low * a, high * b)), weight, moment, grid)
        for a in SHARES
        for b in SHARES
    ]
    assert group_error(grid(made), weight, moment, grid) == pytest.approx(min(tried), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_queries_and_keys_stay(family: str) -> None:
    task, plain = task_of(family), task_of(family)
    Clip(IntGrid(2, group_size=16))(task, lambda: batches(family))
    changed = {
        name.rpartition(".")[2]
        for name, linear in task.linears().items()
        if not torch.equal(linear.weight, plain.linears()[name].weight)
    }
    expected = {
        "llama": {"v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        "gpt2": {"c_proj", "c_fc"},
    }
    assert changed == expected[family]
    data = joined(family)
    assert torch.isfinite(task.encode(data)).all()


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match=r"^weight\.range=MSE.*give weight/range=minmax"):
        Clip(IntGrid(2, range=MSE()))
    with pytest.raises(UserError, match=r"^transform\.sides=three is unknown: give one or both"):
        Clip(IntGrid(2), sides="three")
    with pytest.raises(UserError, match=r"^transform\.skip: .* no x; give some of q, k, v"):
        Clip(IntGrid(2), skip=["x"])(task_of(), lambda: batches("llama"))
