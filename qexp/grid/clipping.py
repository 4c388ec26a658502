"""Codes of values by clamping and rounding, and masks of clipped values."""

from collections.abc import Callable
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

Number = float | int  # shape checks distinguish the two
Rounding = Callable[[Tensor], Tensor]
Clamp = Callable[[Tensor, float, float], Tensor]
End = TypeVar("End", Number, Tensor)


def snap(
    v: Float[Tensor, "*shape"],
    top: int,
    rounding: Rounding,
    clamp: Clamp,
) -> Float[Tensor, "*shape"]:
    """The code of each value: clamped to [0, top], then rounded.

    Where a value was clipped, the gradient of rounding is 1 (R in `qexp.gradients`).
    """
    c = clamp(v, 0, top)
    if rounding is torch.round:
        return rounding(c)
    return torch.lerp(rounding(c), c, ended(v.detach(), c.detach(), top))


# Masks are ones and zeros in the values' dtype: boolean masks cost a CPU many times more.
def ended(v: Tensor, c: Tensor, top: Number) -> Tensor:
    """Mask of values that were clipped to exactly a bound; empty for a soft forward clamp."""
    hard = v.clamp(0, top)
    return (hard - c).eq_(0).mul_(hard.ne_(v))


def inside(v: Tensor, low: End, high: End) -> Tensor:
    """Where a value is not clipped."""
    return v.clamp(low, high).eq_(v)


def reached(v: Tensor, within: Tensor, low: Number, high: Number) -> Tensor:
    """`v`, with the values that are `within` (ones and zeros) moved to an end that they lie beyond;
    gradients pass through the move."""
    moved = torch.lerp(v.detach(), v.detach().clamp(low, high), within)
    return moved + (v - v.detach()) if v.requires_grad else moved
