"""The quantization formula with the gradients of training, as one node of the autograd graph."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.gradients import ClampGradient, Hard, RoundingGradient, Straight, ended
from qexp.grid import Grid, Scale


@dataclass(frozen=True)
class Formula:
    """`grid.round` forward; backward what autograd makes of it with these surrogates, computed
    from x and the scale alone, so that nothing but the input is kept between the two.

    Levels that are not evenly spaced have no cells of equal width: there any `rounding` is
    straight-through.
    """

    rounding: RoundingGradient = Straight()  # noqa: RUF009 (frozen, so sharing the default is safe)
    clamp: ClampGradient = Hard()  # noqa: RUF009

    def __call__(
        self,
        x: Float[Tensor, "*shape"],
        q: Scale,
        grid: Grid,
        gain: float = 1.0,
        training: bool = True,
    ) -> Float[Tensor, "*shape"]:
        """`x` on the grid, in its own dtype, computed in float32. `gain` multiplies the gradients
        of scale and zero (LSQ's 1/√(N q_p)). Outside of training, clamping is hard."""
        clamp = self.clamp if training else Hard()
        y: Tensor = _Fused.apply(x, q.scale, q.zero, grid, self.rounding, clamp, gain)
        return y


    def rows(
        self,
        x: Float[Tensor, "rows columns"],
        q: Scale,
        grid: Grid,
        gain: float = 1.0,
        training: bool = True,
    ) -> Float[Tensor, "rows columns"]:
        """A matrix whose scales are [rows, groups], as `Grid.scales_of` gives them."""
        groups = x.reshape(q.scale.numel(), -1)
        flat = q.map(lambda part: part.reshape(-1, 1))
        return self(groups, flat, grid, gain, training).reshape(x.shape)


def gain(count: int, reach: float) -> float:
    """LSQ's factor of a scale's gradient, 1/√(N q_p): so many values share it, and codes lie up to
    `reach` above zero."""
    return 1 / math.sqrt(count * reach)


def placed(
    scale: Float[Tensor, "*rows groups"], zero: Float[Tensor, "*rows groups"], grid: Grid
) -> Scale:
    """A scale that trains, as storage would keep it; gradients pass straight through."""
    low, high = grid.ends
    whole = grid.has_zero and grid.zero_bits == grid.bits
    if whole:
        kept = zero.detach().round().clamp(low, high)
    else:
        kept = zero.detach().to(grid.stored_dtype).to(zero.dtype) if grid.has_zero else zero
    return Scale(_as(grid.stored(scale.detach()), scale), _as(kept, zero))


def _as(value: Tensor, trained: Tensor) -> Tensor:
    """`value`, bit for bit, with the gradient of `trained`."""
    return value.detach() + (trained - trained.detach())


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero: Tensor,
        grid: Grid,
        rounding: RoundingGradient,
        clamp: ClampGradient,
        gain: float,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, zero)
        ctx.settings = grid, rounding, clamp, gain
        return grid.round(x.float(), Scale(scale, zero), torch.round, clamp.value).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept, scale, zero = ctx.saved_tensors
        grid, rounding, clamp, gain = ctx.settings
        low, high = grid.ends
        x, g = kept.float(), grads[0].float()
        v = x / scale + zero
        h = g
        if not isinstance(rounding, Straight) and low == 0:  # codes: cells of equal width
            c = clamp.value(v, low, high)
            h = torch.where(ended(v, c, high), g, rounding.back(c, g))
        h = h * clamp.slope(v, low, high)
        change: list[Tensor | None] = [None, None]
        if ctx.needs_input_grad[1]:
            y = grid.round(x, Scale(scale, zero), torch.round, clamp.value)
            moved = g * y - h * x
            if not clamp.steps_inside:
                moved *= (v < low) | (v > high)
            change[0] = gain * moved.sum_to_size(scale.shape) / scale
        if ctx.needs_input_grad[2]:
            moved = h - g
            if not clamp.steps_inside:
                moved *= (v < low) | (v > high)
            change[1] = gain * moved.sum_to_size(zero.shape) * scale
        return h.to(kept.dtype), *change, None, None, None, None
