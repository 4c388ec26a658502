"""MagR (Zhang et al., 2406.00800): reduction of the largest weights before quantization."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.common.errors import check_finite, check_int
from qexp.common.on_disk import assign
from qexp.grid import Grid
from qexp.hessian import second_moment
from qexp.step import Record, Step
from qexp.task import Batches, Task
from qexp.transforms.scale_search import check_settings, first
from qexp.walk import Block, walk

# The reference's alpha for one scale per row, and for groups.
ROW, GROUP = 1e-3, 1e-4


@dataclass(frozen=True)
class MagR(Step):
    """Shrinks the largest magnitude of each group of weights, where the layer's output changes
    little: ½ tr((V - W) Ĥ (V - W)ᵀ) + alpha Σ ‖v‖_∞ over groups v, Ĥ = H / λ_max(H).

    Weights change permanently, and with them the float model. A layer's H is that of the inputs
    that the layers before it, already changed, give.

    alpha: in the weights' own units; 0 changes nothing. null: 1e-3 for a grid with one scale per
    row, 1e-4 for one with groups (the reference). steps: of proximal gradient descent.
    sequences: of each calibration batch; null is all of them.
    """

    grid: Grid
    alpha: float | int | None = None
    steps: int = 200
    sequences: int | None = None

    def __post_init__(self) -> None:
        check_settings(self)
        check_int("transform", self, steps=0)
        if self.alpha is not None:
            check_finite("transform", self, "alpha")

    @torch.no_grad()
    def __call__(self, task: Task, batches: Batches) -> list[Record]:
        for block in walk(task, first(batches(), self.sequences), divide=True):
            block.advance(partial(self._shrink, block))
        return []

    def _shrink(self, block: Block, names: tuple[str, ...], inputs: Iterator[Tensor]) -> None:
        """Change the linears that share these inputs."""
        hessian = second_moment(inputs, block.share)
        for name in names:
            linear = block.linears[name]
            groups = self.grid.groups(linear.in_features)
            alpha = self.alpha
            if alpha is None:
                alpha = ROW if groups == 1 else GROUP
            reduced = reduce_magnitude(
                linear.weight.detach().float(), hessian, alpha, self.steps, groups
            )
            assign(linear.weight, reduced)


def reduce_magnitude(
    weight: Float[Tensor, "rows columns"],
    hessian: Float[Tensor, "columns columns"],
    alpha: float,
    steps: int,
    groups: int = 1,
) -> Float[Tensor, "rows columns"]:
    """Proximal gradient descent on MagR's objective, with step 1.

    groups: of adjacent columns in each row, with a largest magnitude each.
    """
    largest = torch.linalg.eigvalsh(hessian.float())[-1]
    scaled = hessian.float() / largest.clamp(min=torch.finfo(torch.float32).tiny)
    value = weight
    for _ in range(steps):
        moved = value - (value - weight) @ scaled
        parts = moved.unflatten(1, (groups, -1)).flatten(0, 1)
        level = clip_level(parts, alpha)
        value = parts.clamp(-level, level).reshape(weight.shape)
    return value


def clip_level(values: Float[Tensor, "rows size"], total: float) -> Float[Tensor, "rows 1"]:
    """The level τ ≥ 0 with Σ max(|v| - τ, 0) = total in each row, 0 where Σ |v| is at most `total`.

    Clipping at it is the proximal map of total · ‖v‖_∞. Newton's method on a convex function that
    is linear in pieces: from below it rises to the root in a few steps and stops there exactly.
    """
    size = values.abs()
    level = (size.sum(1, keepdim=True) - total) / size.shape[1]
    level = torch.maximum(level, size.amax(1, keepdim=True) - total).clamp(min=0)
    while True:
        above = size > level
        count = above.sum(1, keepdim=True).clamp(min=1)
        higher = (size.where(above, 0).sum(1, keepdim=True) - total) / count
        if not (higher > level).any():
            return level
        level = torch.maximum(level, higher)
