"""SmoothQuant (2211.10438): channel scales that move outliers from activations to weights."""

from dataclasses import dataclass

from qexp.common.errors import UserError, check_choice
from qexp.grid import Grid
from qexp.quantizers.scheme import Activations
from qexp.step import Record, Step
from qexp.task import Batches, Task
from qexp.transforms.channels import SITES
from qexp.transforms.scale_search import (
    check_settings,
    first,
    search_and_fold,
    smoothed,
)
from qexp.transforms.site_statistics import ScaleShift, SiteStatistics


@dataclass(frozen=True)
class Smooth(Step):
    """s = max|X|^alpha / max|W|^(1 - alpha) per channel, folded at `sites`.

    alpha: a number for all groups, or a list. From a list each group takes the alpha with the
    smallest output error of its module, with weights rounded to `grid` and inputs quantized as
    `activation`.
    sequences: used from each calibration batch; null uses all.
    """

    grid: Grid
    activation: Activations
    alpha: float | list[float] = 0.5
    sites: str = "norms"
    sequences: int | None = None

    def __post_init__(self) -> None:
        check_settings(self)
        check_choice("transform", self, sites=SITES)
        valid = (type(each) in (int, float) and 0 <= each <= 1 for each in self.alphas)
        if not self.alphas or not all(valid):
            raise UserError(
                f"transform.alpha={self.alpha}: give a number from 0 to 1, or a list of them."
            )

    @property
    def alphas(self) -> list[float]:
        """The candidates."""
        return self.alpha if isinstance(self.alpha, list) else [self.alpha]

    def __call__(self, task: Task, batches: Batches) -> list[Record]:
        def propose(site: SiteStatistics) -> list[ScaleShift]:
            largest, weights = site.largest, site.channels.weights()
            return [ScaleShift(smoothed(largest, weights, alpha)) for alpha in self.alphas]

        data = first(batches(), self.sequences)
        several = len(self.alphas) > 1
        search_and_fold(task, data, self.sites, propose, self.grid, self.activation, several)
        return []
