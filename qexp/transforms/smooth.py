"""SmoothQuant (2211.10438): outliers move from activations into weights."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.common.errors import UserError, check_choice, check_int
from qexp.grid import Grid
from qexp.quantizers.scheme import Activations
from qexp.step import Record, Step
from qexp.task import Batches, Task
from qexp.transforms.channels import SITES
from qexp.transforms.scale_search import ScaleShift, SiteStatistics, first, search_and_fold


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

    def __post_init__(self) -> None:
        check(self)
        check_choice("transform", self, sites=SITES)
        fine = (type(each) in (int, float) and 0 <= each <= 1 for each in self.alphas)
        if not self.alphas or not all(fine):
            raise UserError(
                f"transform.alpha={self.alpha}: give a number from 0 to 1, or a list of such."
            )

    @property
    def alphas(self) -> list[float]:
        """All that are tried."""
        return self.alpha if isinstance(self.alpha, list) else [self.alpha]

    def __call__(self, task: Task, batches: Batches) -> list[Record]:
        def propose(site: SiteStatistics) -> list[ScaleShift]:
            largest, weights = site.largest, site.channels.weights()
            return [ScaleShift(smoothed(largest, weights, alpha)) for alpha in self.alphas]

        data = first(batches(), self.sequences)
        several = len(self.alphas) > 1
        search_and_fold(task, data, self.sites, propose, self.grid, self.activation, several)
        return []


def smoothed(
    inputs: Float[Tensor, " channels"], weights: Float[Tensor, " channels"], alpha: float
) -> Float[Tensor, " channels"]:
    """The scale for channels whose inputs and weights reach so far; 1 where either is dead."""
    scale = inputs.pow(alpha) / weights.pow(1 - alpha)
    return torch.where((inputs > 0) & (weights > 0), scale.clamp(1e-5, 1e5), 1.0)


def check(settings: Any) -> None:
    """UserError unless a transform's `grid` is one, and `sequences` are all or at least 1."""
    if not isinstance(settings.grid, Grid):
        raise UserError(
            f"transform.grid={settings.grid}: a grid is needed here; leave transform.grid out and "
            "choose one for weights, for example weight=int."
        )
    if settings.sequences is not None:
        check_int("transform", settings, sequences=1)
