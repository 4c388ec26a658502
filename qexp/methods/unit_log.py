"""Best parameters of a unit in training, and the lines of its log."""

from collections.abc import Mapping
from math import inf

import torch
from torch import Tensor

from qexp.methods.units import Unit
from qexp.training.code_statistics import CodeStatistics
from qexp.training.optimizer import Parameters

Log = list[dict[str, float | int | str]]


class Best:
    """The parameters with the least loss of a unit's first piece, as far as they were looked at."""

    def __init__(self, unit: Unit, parameters: Parameters) -> None:
        self.unit, self.loss = unit, inf
        self.parameters = [p for group in parameters.values() for p in group]
        self.values: list[Tensor] = []

    @torch.no_grad()
    def look(self, keep: str) -> None:
        if keep == "last":
            return
        if (loss := self.unit.hard_loss()) < self.loss:
            self.loss, self.values = loss, [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, value in zip(self.parameters, self.values, strict=False):
            parameter.copy_(value)


def lines(
    at: Mapping[str, float | int | str], unit: Unit, losses: Tensor, statistics: CodeStatistics
) -> Log:
    """A line for the unit and one for each linear, which are one where the unit is a linear."""
    moved = statistics()
    rows: dict[str, dict[str, float | int | str]] = {
        unit.label: {"loss": float(losses.mean()), **moved.whole}
    }
    for name, numbers in moved.tensors.items():
        rows.setdefault(name, {}).update(numbers)
    return [{**at, "name": name, **row} for name, row in rows.items()]
