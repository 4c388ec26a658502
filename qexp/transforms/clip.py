"""Clipping of weights by the output error of each group (AWQ, BitDistiller)."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qexp.common.errors import UserError, check_choice
from qexp.common.on_disk import assign
from qexp.grid import Grid
from qexp.grid.ranges import MinMax
from qexp.hessian import second_moment
from qexp.step import Record, Step
from qexp.task import Batches, Task
from qexp.transforms.scale_search import check_settings, first
from qexp.walk import Block, walk

SIDES = ("one", "both")
SHARES = [1 - step / 20 for step in range(10)]  # 1, 0.95 … 0.55


@dataclass(frozen=True)
class Clip(Step):
    """Clips each group of weights at the ends with the least output error (asymmetric clipping of
    BitDistiller, 2402.10631, section 3.2). Weights change permanently, and the float model with
    them; inputs are those that the linears before, already clipped, give.

    sides: `both` ends of a group have a share of their own, `one` for the largest magnitude (AWQ).
    skip: linears that stay, by role (`Arch.roles`); where queries, keys and values are one matrix,
    each of the three names it.
    sequences: of each calibration batch; null is all of them.
    """

    grid: Grid
    sides: str = "both"
    skip: tuple[str, ...] | list[str] = ("q", "k")
    sequences: int | None = None

    def __post_init__(self) -> None:
        check_settings(self)
        check_choice("transform", self, sides=SIDES)
        if self.grid.range != MinMax():
            raise UserError(
                f"weight.range={self.grid.range}: transform=clip moves weights to the ends of "
                "ranges, which only min-max finds again; give weight/range=minmax."
            )

    @torch.no_grad()
    def __call__(self, task: Task, batches: Batches) -> list[Record]:
        roles = task.arch.roles
        fused = {"q": "qkv", "k": "qkv", "v": "qkv"} if "qkv" in roles else {}
        skip = [fused.get(role, role) for role in self.skip]
        kept = task.arch.linears_of(skip, "transform.skip")
        for block in walk(task, first(batches(), self.sequences), divide=True):
            block.advance(partial(self._clip, block, kept))
        return []

    def _clip(
        self, block: Block, kept: set[str], names: tuple[str, ...], inputs: Iterator[Tensor]
    ) -> None:
        """Change the linears that share these inputs."""
        moment = second_moment(inputs, block.share)
        for name in names:
            if name not in kept:
                linear = block.linears[name]
                assign(linear.weight, clipped(linear, moment, self.grid, self.sides))


def clipped(
    linear: nn.Linear, moment: Float[Tensor, "columns columns"], grid: Grid, sides: str
) -> Float[Tensor, "rows columns"]:
    """The weights, with each group of each row clipped at shares of its ends.

    The shares are those of 1, 0.95 … 0.55 with the smallest output error δᵀ (Σ x xᵀ) δ over the
    group's columns.

    moment: Σ x xᵀ of the linear's inputs. sides: `one` share of the largest magnitude, or one for
    each of `both` ends.
    """
    weight = linear.weight.detach().float()
    rows, columns = weight.shape
    size = columns // grid.groups(columns)
    tiles = moment.reshape(columns // size, size, columns // size, size)
    blocks = tiles.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [groups, size, size]
    groups = weight.reshape(rows, -1, size)
    low, high = groups.amin(2), groups.amax(2)
    if sides == "one":
        high = torch.maximum(low.abs(), high.abs())
        low = -high
    if grid.per_tensor:
        low, high = low.min().expand_as(low), high.max().expand_as(high)
    pairs = [(share, share) for share in SHARES]
    if sides == "both":
        pairs = [(below, above) for below in SHARES for above in SHARES]
    best_error = torch.full_like(high, torch.inf)
    best_low, best_high = low, high
    for below, above in pairs:
        ends = low * below, high * above
        wide = [end.repeat_interleave(size, 1) for end in ends]
        change = (grid(weight.clamp(*wide)) - weight).reshape(rows, -1, size)
        error = torch.einsum("rgi,gij,rgj->rg", change, blocks, change)
        if grid.per_tensor:
            error = error.sum().expand_as(error)
        better = error < best_error
        best_low, best_high = (
            torch.where(better, new, old)
            for new, old in zip(ends, (best_low, best_high), strict=True)
        )
        best_error = torch.minimum(error, best_error)
    wide = [end.repeat_interleave(size, 1) for end in (best_low, best_high)]
    return weight.clamp(*wide).to(linear.weight)
