"""Dither: its size, its seed, the steps it finds, and models that lie on no grid."""

import pytest
import torch
from helpers.models import task_of

from qexp.common.errors import FieldError, UserError
from qexp.grid import IntGrid
from qexp.task import Task
from qexp.transforms.dither import Dither, steps

GRID = IntGrid(4, group_size=32, real_zero=True)


def on_grid() -> Task:
    """A tiny model as a 4-bit file would give it."""
    task = task_of()
    for linear in task.linears().values():
        linear.weight.data = GRID(linear.weight.detach())
    return task


def weights(task: Task) -> dict[str, torch.Tensor]:
    return {name: linear.weight.detach().clone() for name, linear in task.linears().items()}


def test_an_amplitude_of_zero_changes_nothing():
    task = on_grid()
    before = weights(task)
    assert Dither(amplitude=0)(task, list) == []
    assert all(torch.equal(before[name], weight) for name, weight in weights(task).items())


@pytest.mark.parametrize("amplitude", [0.5, 1.0])
def test_every_weight_moves_by_at_most_half_the_amplitude_evenly(amplitude):
    task = on_grid()
    before, others = weights(task), task.model.lm_head.weight.clone()
    Dither(amplitude=amplitude)(task, list)
    moves = []
    for name, weight in weights(task).items():
        step = steps(before[name], 32, 16).repeat_interleave(32, 1)
        moves.append(((weight - before[name]) / step).flatten())
    u = torch.cat(moves) / amplitude
    assert float(u.abs().max()) <= 0.5 + 1e-3
    counts = torch.histc(u, 10, -0.5, 0.5) / len(u)
    assert float((counts - 0.1).abs().max()) < 0.01
    assert torch.equal(task.model.lm_head.weight, others)


def test_the_seed_alone_decides():
    made = []
    for seed in (0, 0, 1):
        task = on_grid()
        Dither(seed=seed)(task, list)
        made.append(weights(task))
    first, again, other = made
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_the_step_is_found_where_ends_or_neighbours_are_not_used():
    full = torch.arange(16.0) * 0.25 - 1
    sparse = torch.tensor([3.0, 0.0, 3.0, 7.0] * 4) * 0.1 + 5
    constant = torch.full((16,), 2.0)
    found = steps(torch.stack([full, sparse, constant]), 16, 16)
    torch.testing.assert_close(found.flatten(), torch.tensor([0.25, 0.1, 0.0]))


@pytest.mark.parametrize(
    ("field", "reason"),
    [({}, "lies on no grid of 16 levels"), ({"group_size": 48}, "no multiple of transform.group")],
)
def test_a_model_on_no_such_grid_is_refused_unchanged(field, reason):
    task = task_of()
    before = weights(task)
    with pytest.raises(UserError, match=f"transform=dither: model.layers.0.*{reason}"):
        Dither(**field)(task, list)
    assert all(torch.equal(before[name], weight) for name, weight in weights(task).items())


@pytest.mark.parametrize("field", [{"amplitude": -1.0}, {"group_size": 1}, {"levels": 1}])
def test_a_wrong_field_is_refused(field):
    with pytest.raises(FieldError, match=f"^{next(iter(field))}="):
        Dither(**field)
