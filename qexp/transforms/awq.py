"""AWQ (2306.00978): activation-aware channel scales and weight clipping."""

from dataclasses import dataclass

import torch

from qexp.common.errors import check_choice, check_int, check_number
from qexp.common.on_disk import assign
from qexp.grid import Grid
from qexp.hessian.layerwise import mirrored
from qexp.quantizers.scheme import FloatActivations
from qexp.step import Record, Step
from qexp.task import Batches, Task
from qexp.transforms.channels import SITES
from qexp.transforms.clip import clipped
from qexp.transforms.input_moments import InputMoments
from qexp.transforms.scale_search import check_settings, first, pieces, search_and_fold
from qexp.transforms.site_statistics import ScaleShift, SiteStatistics
from qexp.walk import Block


@dataclass(frozen=True)
class AWQ(Step):
    """Scale s = mean|X|^a, divided by √(max · min) of itself, per channel; then weight clipping.

    grouped_values: also value → output projection where several query heads share a value head,
    which the reference leaves out, since the shapes of the two differ there.
    clip: the second part. It changes weights permanently, as part of how they will be rounded, and
    with it the float model's logits; scales alone do not.
    sequences: of each calibration batch; null is all of them.
    margin: scales whose error on a part of the data exceeds the least by this many standard errors
    are not measured on the rest (`race.least`); inf measures all of them on all.
    """

    grid: Grid
    points: int = 20
    clip: bool = True
    grouped_values: bool = False
    sites: str = "norms+value+up"
    sequences: int | None = None
    margin: float | int = 3.0

    def __post_init__(self) -> None:
        check_settings(self)
        check_choice("transform", self, sites=SITES)
        check_int("transform", self, points=1)
        check_number("transform", self, margin=0)

    @torch.no_grad()
    def __call__(self, task: Task, batches: Batches) -> list[Record]:
        data = first(batches(), self.sequences)
        search_and_fold(
            task,
            pieces(data),
            self.sites,
            self.propose,
            self.grid,
            FloatActivations(),
            searched=self.points > 1,
            margin=self.margin,
            finish=self._clip,
        )
        return []

    def propose(self, site: SiteStatistics) -> list[ScaleShift]:
        if site.channels.repeats > 1 and not self.grouped_values:
            return [ScaleShift(torch.ones_like(site.mean))]
        powers = (step / self.points for step in range(self.points))
        scales = (site.mean.pow(power).clamp(min=1e-4) for power in powers)
        return [ScaleShift(scale / (scale.max() * scale.min()).sqrt()) for scale in scales]

    def _clip(self, block: Block, moments: InputMoments) -> None:
        if not self.clip:
            return
        linears = block.linears
        # the first group is the attention's; values are the producer of the output projection
        attention = set(block.groups[0].linears) - {group.producer for group in block.groups}
        for group in block.groups:
            moment = mirrored(moments[linears[group.linears[0]]])
            for name in group.linears:
                if name not in attention:
                    assign(linears[name].weight, clipped(linears[name], moment, self.grid, "one"))
