"""Outlier Suppression+ (2304.09145): channels are centred, those that reach far are shrunk."""

from dataclasses import dataclass

import torch

from qexp.common.errors import check_choice, check_int
from qexp.grid import Grid
from qexp.quantizers.scheme import Activations
from qexp.step import Record, Step
from qexp.task import Batches, Task
from qexp.transforms.channels import SITES
from qexp.transforms.scale_search import (
    ScaleShift,
    SiteStatistics,
    check_settings,
    first,
    search_and_fold,
)


@dataclass(frozen=True)
class OutlierSuppression(Step):
    """Shift each channel by the middle of its range, then divide it by max(1, reach / t); the
    threshold t is the best of `points` equal steps up to the largest reach, by the output of the
    group's module with weights rounded to `grid` and inputs as `activation` will.

    shift: false leaves ranges where they are. Where the source has no bias to take a shift (RMS
    norms, up projections) there is none in any case.
    """

    grid: Grid
    activation: Activations
    shift: bool = True
    points: int = 20  # [choice]
    sites: str = "norms"
    sequences: int | None = None

    def __post_init__(self) -> None:
        check_settings(self)
        check_choice("transform", self, sites=SITES)
        check_int("transform", self, points=1)

    def __call__(self, task: Task, batches: Batches) -> list[Record]:
        def propose(site: SiteStatistics) -> list[ScaleShift]:
            low, high = site.ends
            middle = (low + high) / 2
            shift = middle if self.shift and site.channels.shiftable else None
            reach = (high - low) / 2 if shift is not None else torch.maximum(-low, high)
            thresholds = (reach.max() * step / self.points for step in range(self.points, 0, -1))
            return [
                ScaleShift((reach / threshold.clamp(min=1e-12)).clamp(min=1), shift)
                for threshold in thresholds
            ]

        data = first(batches(), self.sequences)
        search_and_fold(
            task, data, self.sites, propose, self.grid, self.activation, self.points > 1
        )
        return []
