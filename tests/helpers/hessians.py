"""Hessians of every linear of a task."""

import torch

from qexp.grid import IntGrid
from qexp.walk import walk

GRID = IntGrid(3, group_size=32)


def measured(task, source, data) -> dict[str, torch.Tensor]:
    """By full name, of a walk that changes nothing."""
    found, for_each_group = {}, None
    for block in walk(task, data):
        for_each_group = for_each_group or source.prepare(block)
        for_each_group(block, keeping(found, block.name))
    return found


def keeping(found: dict[str, torch.Tensor], prefix: str):
    """Keeps the Hessians that it is called with in `found`."""

    def on_hessian(names: tuple[str, ...], hessian: torch.Tensor, _: object) -> None:
        found.update({f"{prefix}.{name}": hessian for name in names})

    return on_hessian
