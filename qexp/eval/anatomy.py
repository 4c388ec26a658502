"""Statistics of activations, matrices and norms that predict quantization error (2305.19268)."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.grid import IntGrid
from qexp.grid.observers import HistogramObserver
from qexp.task import Task

TOKEN = IntGrid(8, symmetric=True, narrow=True)  # of `error8`: a scale per token
Statistics = Mapping[str, Mapping[str, float]]  # by name of the tensor, then of the statistic


@dataclass
class Tally:
    """Sums over a stream of tensors whose last axis are channels, in float64.

    reach: max|x| / median|x| (the median to a part in 2^15 of the maximum). kurtosis: fourth
    central moment over the squared second, 3 for a normal distribution. top_channel: share of the
    energy in the channel that has most. error8: ‖x - Q(x)‖ / ‖x‖ with 8 bits and a scale per token.
    """

    magnitudes: HistogramObserver = field(default_factory=HistogramObserver)
    powers: Tensor = field(default_factory=lambda: torch.zeros(5, dtype=torch.float64))
    energy: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    lost: float = 0.0

    def add(self, x: Float[Tensor, "... channels"]) -> None:
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        self.magnitudes.add(rows.abs())
        exact = rows.double()
        self.powers += torch.stack([exact.pow(k).sum() for k in range(5)]).cpu()
        self.energy = self.energy + exact.square().sum(0).cpu()
        self.lost += float((TOKEN(rows) - rows).double().square().sum())

    def statistics(self) -> dict[str, float]:
        (values,), counts = self.magnitudes.values()
        assert counts is not None
        below = counts[0].double().cumsum(0)
        middle = values[torch.searchsorted(below, below[-1:] / 2)]
        _, one, two, three, four = (self.powers / self.powers[0]).tolist()
        variance = two - one**2
        fourth = four - 4 * one * three + 6 * one**2 * two - 3 * one**4
        total = float(self.energy.sum())
        return {
            "reach": float(values[-1] / middle),
            "kurtosis": fourth / variance**2,
            "top_channel": float(self.energy.max()) / total,
            "error8": (self.lost / total) ** 0.5,
        }


def flatness(weight: Float[Tensor, "rows columns"]) -> float:
    """‖W‖₂ / ‖W‖_F · √min(m, n): 1 where all singular values are equal."""
    narrow = weight.detach().double()
    narrow = narrow.T if narrow.shape[0] > narrow.shape[1] else narrow
    values = torch.linalg.eigvalsh(narrow @ narrow.T)
    return float((values[-1] / values.sum() * len(values)).sqrt())


def gains(task: Task) -> dict[str, float]:
    """The standard deviation of the weights of every norm."""
    names = [
        f"{task.arch.blocks}.{n}.{x}" for n in range(len(task.blocks)) for x in task.arch.norms
    ]
    names += [] if task.arch.norm is None else [task.arch.norm]
    found = {name: task.model.get_submodule(name).weight for name in names}
    return {
        name: float(weight.detach().double().std(correction=0))
        for name, weight in found.items()
        if isinstance(weight, Tensor)
    }


def anatomy(tallies: Mapping[str, Tally], task: Task) -> Statistics:
    """Of the observed tensors, of every quantized matrix (`flatness`) and of norms (`gain_std`)."""
    found: dict[str, dict[str, float]] = {name: t.statistics() for name, t in tallies.items()}
    for name, linear in task.linears().items():
        found[f"{name}.weight"] = {"flatness": flatness(linear.weight)}
    return found | {name: {"gain_std": value} for name, value in gains(task).items()}
