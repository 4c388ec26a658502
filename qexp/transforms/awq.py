"""AWQ (2306.00978): activation-aware channel scales and weight clipping."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qexp.common.errors import check_choice, check_int, check_number
from qexp.grid import Grid
from qexp.hessian.layerwise import mirrored
from qexp.quantizers.scheme import FloatActivations
from qexp.step import Record, Step
from qexp.task import Batches, Task
from qexp.transforms.channels import SITES
from qexp.transforms.scale_search import check_settings, first, pieces, search_and_fold
from qexp.transforms.site_statistics import InputMoments, ScaleShift, SiteStatistics
from qexp.walk import Block


@dataclass(frozen=True)
class AWQ(Step):
    """Scale s = mean|X|^a, divided by √(max · min) of itself, per channel; then weight clipping.

    grouped_values: also value → output projection where several query heads share a value head,
    which the reference leaves out, since the shapes of the two differ there.
    clip: the second part. It changes weights permanently, as part of how they will be rounded, and
    with it the float model's logits; scales alone do not.
    sequences: of each calibration batch; null is all of them.
    margin: scales whose error on some sequences exceeds the least by this many standard errors are
    not measured on the others (`race.least`); inf measures all of them on all.
    """

    grid: Grid
    points: int = 20
    clip: bool = True
    grouped_values: bool = False
    sites: str = "norms+value+up"
    sequences: int | None = None
    margin: float | int = 4.0

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
            self._propose,
            self.grid,
            FloatActivations(),
            searched=self.points > 1,
            margin=self.margin,
            finish=self._clip,
        )
        return []

    def _propose(self, site: SiteStatistics) -> list[ScaleShift]:
        if site.channels.repeats > 1 and not self.grouped_values:
            return [ScaleShift(torch.ones_like(site.mean))]
        powers = (step / self.points for step in range(self.points))
        scales = (site.mean.pow(power).clamp(min=1e-4) for power in powers)
        return [ScaleShift(scale / (scale.max() * scale.min()).sqrt()) for scale in scales]

    def _clip(self, block: Block, moments: InputMoments) -> None:
        if not self.clip:
            return
        linears, producers = block.linears, {group.producer for group in block.groups}
        # the first group is the attention's; values are the producer of the output projection
        attention = set(block.groups[0].linears) - producers
        for group in block.groups:
            moment = mirrored(moments[linears[group.linears[0]]])
            for name in group.linears:
                if name not in attention:
                    linears[name].weight.data = clipped(linears[name], moment, self.grid)


def clipped(
    linear: nn.Linear, moment: Float[Tensor, "columns columns"], grid: Grid
) -> Float[Tensor, "rows columns"]:
    """The weights, with each group of each row clipped at a share of its largest magnitude.

    The share is the one of 1, 0.95 … 0.55 with the smallest output error δᵀ (Σ x xᵀ) δ over the
    group's columns.

    moment: Σ x xᵀ of the linear's inputs.
    """
    weight = linear.weight.detach().float()
    rows, columns = weight.shape
    size = columns // grid.groups(columns)
    tiles = moment.reshape(columns // size, size, columns // size, size)
    blocks = tiles.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [groups, size, size]
    largest = weight.reshape(rows, -1, size).abs().amax(2)
    if grid.per_tensor:
        largest = largest.max().expand_as(largest)
    best_error, best_limit = torch.full_like(largest, torch.inf), largest
    for step in range(10):
        limit = largest * (1 - step / 20)
        wide = limit.repeat_interleave(size, 1)
        change = (grid(weight.clamp(-wide, wide)) - weight).reshape(rows, -1, size)
        error = torch.einsum("rgi,gij,rgj->rg", change, blocks, change)
        if grid.per_tensor:
            error = error.sum().expand_as(error)
        best_limit = torch.where(error < best_error, limit, best_limit)
        best_error = torch.minimum(best_error, error)
    wide = best_limit.repeat_interleave(size, 1)
    return weight.clamp(-wide, wide).to(linear.weight)
