"""Uniform dither of weights by a step of the grid that they lie on."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.common.errors import UserError, check_finite, check_int
from qexp.common.on_disk import assign
from qexp.step import Record, Step
from qexp.task import Batches, Task

# Largest distance of a value from its level, in steps: what float32 rounding of
# scale * code + minimum leaves is below a thousandth.
TOLERANCE = 0.01


@dataclass(frozen=True)
class Dither(Step):
    """W + amplitude · step · u for the quantized linears, u uniform on [-1/2, 1/2).

    The step is that of each group of `group_size` columns in a row, on a grid of at most `levels`
    even levels, and is found from the values (`steps`). An amplitude of 1 fills the gap between two
    levels evenly. Unlike other transforms it changes the model's function.
    """

    amplitude: float | int = 1.0  # width of the interval, in steps
    group_size: int = 32
    levels: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        check_finite(None, self, "amplitude")
        check_int(None, self, group_size=2, levels=2, seed=0)

    @torch.no_grad()
    def __call__(self, task: Task, batches: Batches) -> list[Record]:
        linears = task.linears()
        found = {}  # all of them first: a model that lies on no grid stays as it is
        for name, linear in linears.items():
            try:
                found[name] = steps(linear.weight.float(), self.group_size, self.levels)
            except UserError as reason:
                raise UserError(f"transform=dither: {name} {reason}") from reason
        generator = torch.Generator().manual_seed(self.seed)
        for name, linear in linears.items():
            weight = linear.weight
            noise = torch.rand(weight.shape, generator=generator).sub_(0.5).to(weight.device)
            step = found[name].repeat_interleave(self.group_size, 1)
            assign(weight, weight + self.amplitude * step * noise)
        return []


def steps(
    weight: Float[Tensor, "rows columns"], group_size: int, levels: int
) -> Float[Tensor, "rows groups"]:
    """The step of the coarsest even grid of at most `levels` levels on which a group's values lie,
    its ends among them; 0 where all are equal. UserError where a group lies on no such grid."""
    if weight.shape[1] % group_size:
        raise UserError(
            f"has {weight.shape[1]} columns, no multiple of transform.group_size={group_size}; "
            "give the group size of the file's format."
        )
    groups = weight.unflatten(1, (-1, group_size)).double()
    above = groups - groups.amin(-1, keepdim=True)
    span = above.amax(-1)
    found = torch.zeros_like(span)
    for intervals in range(1, levels):
        position = above / (span / intervals).clamp(min=torch.finfo(torch.float64).tiny)[..., None]
        fits = (position - position.round()).abs().amax(-1) < TOLERANCE
        found = torch.where(fits & (found == 0), span / intervals, found)
    if lost := int(((found == 0) & (span > 0)).sum()):
        raise UserError(
            f"lies on no grid of {levels} levels in groups of {group_size} ({lost} of "
            f"{span.numel()} groups); choose a model whose file stores its weights so, or give "
            "transform.levels and transform.group_size of its format."
        )
    return found.to(weight.dtype)
