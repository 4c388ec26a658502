"""AWQ (2306.00978): activation-aware channel scales and weight clipping."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qexp.common.errors import check_choice, check_int
from qexp.grid import Grid
from qexp.hessian import second_moment
from qexp.quantizers.scheme import FloatActivations
from qexp.step import Record, Step
from qexp.task import Batches, Task
from qexp.transforms.channels import SITES
from qexp.transforms.scale_search import (
    ScaleShift,
    SiteStatistics,
    check_settings,
    first,
    on_device,
    search_and_fold,
)
from qexp.walk import Block, walk


@dataclass(frozen=True)
class AWQ(Step):
    """Scale s = mean|X|^a, divided by √(max · min) of itself, per channel; then weight clipping.

    grouped_values: also value → output projection where several query heads share a value head,
    which the reference leaves out, since the shapes of the two differ there.
    clip: the second part. It changes weights for good, as part of how they will be rounded, and
    with it the float model's logits; scales alone do not.
    sequences: of each calibration batch; null is all of them.
    """

    grid: Grid
    points: int = 20
    clip: bool = True
    grouped_values: bool = False
    sites: str = "norms+value+up"
    sequences: int | None = None

    def __post_init__(self) -> None:
        check_settings(self)
        check_choice("transform", self, sites=SITES)
        check_int("transform", self, points=1)

    @torch.no_grad()
    def __call__(self, task: Task, batches: Batches) -> list[Record]:
        data = first(batches(), self.sequences)
        weight_only = FloatActivations()
        search_and_fold(
            task, data, self.sites, self._propose, self.grid, weight_only, self.points > 1
        )
        if self.clip:
            for block in walk(task, data):
                self._clip(block)
        return []

    def _propose(self, site: SiteStatistics) -> list[ScaleShift]:
        if site.channels.repeats > 1 and not self.grouped_values:
            return [ScaleShift(torch.ones_like(site.mean))]
        powers = (step / self.points for step in range(self.points))
        scales = (site.mean.pow(power).clamp(min=1e-4) for power in powers)
        return [ScaleShift(scale / (scale.max() * scale.min()).sqrt()) for scale in scales]

    def _clip(self, block: Block) -> None:
        moments: dict[str, Tensor] = {}

        def visit(names: tuple[str, ...], inputs: Iterator[Tensor]) -> None:
            moments.update(dict.fromkeys(names, second_moment(inputs)))

        block.advance(visit)  # the next block's inputs are those of unclipped weights
        producers = {group.producer for group in block.groups}
        # the first group is the attention's; values are the producer of the output projection
        attention = set(block.groups[0].linears) - producers
        with on_device(block):
            for name, linear in block.linears.items():
                if name not in attention:
                    linear.weight.data = clipped(linear, moments[name], self.grid)


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
