"""Outlier Suppression+ (2304.09145): channel-wise shifting and scaling."""

from dataclasses import dataclass
from math import inf

import torch

from qexp.common.errors import check_choice, check_int, check_number, check_positive
from qexp.grid import Grid
from qexp.quantizers.scheme import Activations
from qexp.step import Record, Step
from qexp.task import Batches, Task
from qexp.transforms.channels import SITES
from qexp.transforms.scale_search import (
    check_settings,
    first,
    pieces,
    search_and_fold,
)
from qexp.transforms.site_statistics import ScaleShift, SiteStatistics

TINY = 1e-12  # of a tensor of zeros


@dataclass(frozen=True)
class OutlierSuppression(Step):
    """Shift each channel by the middle of its range, then divide it by max(1, reach / t); the
    threshold t is the best of `points` from the largest reach down to `lowest` in equal steps, by
    the output of the group's module with weights rounded to `grid` and inputs as `activation` will.

    points: null is the reference's number, one for every 0.5 of the largest reach and at least 100.
    lowest: in the activation's own units. Where nothing reaches so far, nothing is shrunk.
    shift: false leaves ranges where they are. Where the source has no bias to take a shift (RMS
    norms, up projections) there is none in any case.
    margin: thresholds whose error on a part of the data exceeds the least by this many standard
    errors are not measured on the rest (`race.least`); inf measures all of them on all. So does
    any, where `activation` has ranges of whole tensors: those of a part would be others.
    """

    grid: Grid
    activation: Activations
    shift: bool = True
    points: int | None = None
    lowest: float | int = 0.1
    sites: str = "norms"
    sequences: int | None = None
    margin: float | int = 3.0

    def __post_init__(self) -> None:
        check_settings(self)
        check_choice("transform", self, sites=SITES)
        if self.points is not None:
            check_int("transform", self, points=1)
        check_positive("transform", self, "lowest")
        check_number("transform", self, margin=0)

    def __call__(self, task: Task, batches: Batches) -> list[Record]:
        data = first(batches(), self.sequences)
        apart = self.activation.rowwise
        search_and_fold(
            task,
            pieces(data) if apart else data,
            self.sites,
            self.propose,
            self.grid,
            self.activation,
            searched=self.points != 1,
            margin=self.margin if apart else inf,
        )
        return []

    def propose(self, site: SiteStatistics) -> list[ScaleShift]:
        """A change for each threshold."""
        low, high = site.ends
        middle = (low + high) / 2
        shift = middle if self.shift and site.channels.shiftable else None
        reach = (high - low) / 2 if shift is not None else torch.maximum(-low, high)
        return [
            ScaleShift((reach / threshold).clamp(min=1), shift)
            for threshold in self.thresholds(float(reach.max()))
        ]

    def thresholds(self, largest: float) -> list[float]:
        """Those that are tried where channels reach up to `largest`."""
        if largest <= self.lowest:
            return [max(largest, TINY)]
        count = max(100, int(largest / 0.5)) if self.points is None else self.points
        step = (largest - self.lowest) / max(count - 1, 1)
        return [largest - step * n for n in range(count)]
