"""Hessians of every linear of a task."""

import torch

from qexp.grid import IntGrid
from qexp.walk import walk

GRID = IntGrid(3, group_size=32)


def measured(task, source, data) -> dict[str, torch.Tensor]:
    return {
        f"{block.name}.{name}": hessian
        for block in walk(task, data)
        for name, hessian in source(block).items()
    }
