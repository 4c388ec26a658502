"""SmoothQuant (2211.10438): outliers move from activations into weights."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.activations import Activations
from qexp.grid import Grid
from qexp.methods.step import Batches, Record, Step
from qexp.task import Task
from qexp.transforms.search import Change, Watched, first, rescale


@dataclass(frozen=True)
class Smooth(Step):
    """s = max|X|^alpha / max|W|^(1 - alpha) for each channel, folded where `sites` says.

    alpha: one for all groups; or several, of which each group takes the one that moves its module's
    output least when weights are rounded to `grid` and inputs as `activation` will.
    sequences: of each calibration batch; null is all of them.
    """

    grid: Grid
    activation: Activations
    alpha: float | list[float] = 0.5
    sites: str = "norms"
    sequences: int | None = None

    def __call__(self, task: Task, batches: Batches) -> list[Record]:
        alphas = self.alpha if isinstance(self.alpha, list) else [self.alpha]

        def propose(watched: Watched) -> list[Change]:
            largest, weights = watched.largest, watched.channels.weights()
            return [Change(smoothed(largest, weights, alpha)) for alpha in alphas]

        data = first(batches(), self.sequences)
        several = len(alphas) > 1
        rescale(task, data, self.sites, propose, self.grid, self.activation, several)
        return []


def smoothed(
    inputs: Float[Tensor, " channels"], weights: Float[Tensor, " channels"], alpha: float
) -> Float[Tensor, " channels"]:
    """The scale for channels whose inputs and weights reach so far; 1 where either is dead."""
    scale = inputs.pow(alpha) / weights.pow(1 - alpha)
    return torch.where((inputs > 0) & (weights > 0), scale.clamp(1e-5, 1e5), 1.0)
