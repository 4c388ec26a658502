"""Differentiable quantize-dequantize with surrogate gradients, as one autograd node."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.gradients import ClampGradient, Hard, RoundingGradient, Straight
from qexp.grid import Grid, Scale
from qexp.grid.clipping import inside

CHUNK = 2**17  # values


@dataclass(frozen=True)
class FakeQuantize:
    """`grid.round` in the forward pass; its gradient with these surrogates in the backward pass.

    The backward pass is computed from x and the scale, so that only the input is kept for it, and
    the values of a rounding that is not to nearest.
    """

    rounding: RoundingGradient = Straight()  # noqa: RUF009 (frozen, so sharing the default is safe)
    clamp: ClampGradient = Hard()  # noqa: RUF009

    def __call__(
        self,
        x: Float[Tensor, "*shape"],
        q: Scale,
        grid: Grid,
        gradient_scale: float = 1.0,
        training: bool = True,
    ) -> Float[Tensor, "*shape"]:
        """`x` on the grid, in its own dtype, computed in float32.

        gradient_scale: factor of the gradients of scale and zero point (1/√(N q_p) of LSQ). In
        evaluation clamping is hard, and rounding to nearest.
        """
        clamp = self.clamp if training else Hard()
        rounding = self.rounding if training or self.rounding.is_nearest else Straight()
        fitted = q.fitted or (None, None)
        y: Tensor = _Fused.apply(x, q.scale, q.zero, *fitted, grid, rounding, clamp, gradient_scale)
        return y

    def at(self, step: int, steps: int) -> "FakeQuantize":
        """As it is at a step of training, counted from 0, of `steps`."""
        return replace(self, rounding=self.rounding.at(step, steps))

    def rows(
        self,
        x: Float[Tensor, "rows columns"],
        q: Scale,
        grid: Grid,
        gradient_scale: float = 1.0,
        training: bool = True,
    ) -> Float[Tensor, "rows columns"]:
        """The same for a matrix with scales [rows, groups], as `Grid.scales_of` returns them."""
        groups = x.reshape(q.scale.numel(), -1)
        flat = q.map(lambda part: part.reshape(-1, 1))
        return self(groups, flat, grid, gradient_scale, training).reshape(x.shape)


def lsq_gradient_scale(count: int, highest_code: float) -> float:
    """1/√(N q_p), the factor of a scale's gradient in LSQ (1902.08153, section 2.2): N values share
    the scale, and q_p is the highest code above the zero point."""
    return 1 / math.sqrt(count * highest_code)


def as_stored(
    scale: Float[Tensor, "*rows groups"], zero: Float[Tensor, "*rows groups"], grid: Grid
) -> Scale:
    """A trained scale and zero point as storage keeps them, with straight-through gradients."""
    low, high = grid.bounds
    whole = grid.has_zero and grid.zero_bits == grid.bits
    if whole:
        kept = zero.detach().round().clamp(low, high)
    else:
        kept = zero.detach().to(grid.stored_dtype).to(zero.dtype) if grid.has_zero else zero
    stored = grid.as_stored(scale.detach())
    return Scale(straight_through(stored, scale), straight_through(kept, zero))


def straight_through(value: Tensor, trained: Tensor) -> Tensor:
    """`value` bit for bit, with the gradient of `trained`."""
    return value.detach() + (trained - trained.detach())


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero: Tensor,
        low: Tensor | None,
        high: Tensor | None,
        grid: Grid,
        rounding: RoundingGradient,
        clamp: ClampGradient,
        gradient_scale: float,
    ) -> Tensor:
        ctx.settings = grid, rounding, clamp, gradient_scale
        rows = x.reshape(-1, x.shape[-1])
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        made = y.view(rows.shape)
        kept = None if rounding.is_nearest else y
        ctx.save_for_backward(x, scale, zero, low, high, kept)
        if clamp.clips:  # then the interval makes no difference to values
            low = high = None
        seen = torch.clamp if clamp.clips else clamp.value
        rule = torch.round if rounding.is_nearest else rounding.value
        for part in _chunks(rows):
            q = _placed(scale, zero, low, high, part)
            made[part] = grid.round(rows[part].float(), q, rule, seen)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero, low, high, kept = ctx.saved_tensors
        rows, upstream = (t.reshape(-1, t.shape[-1]) for t in (x, grads[0]))
        values = None if kept is None else kept.reshape(rows.shape)
        change = torch.empty_like(rows)
        sums = [
            torch.zeros_like(t) if needed else None
            for t, needed in zip((scale, zero), ctx.needs_input_grad[1:3], strict=True)
        ]
        for part in _chunks(rows):
            q = _placed(scale, zero, low, high, part)
            own = [None if total is None else _of(total, part) for total in sums]
            y = None if values is None else values[part].float()
            g = upstream[part].float()
            change[part] = _back(rows[part].float(), g, q, own, y, *ctx.settings)
        return change.reshape(x.shape), *sums, *[None] * 6


def _back(
    x: Tensor,
    g: Tensor,
    q: Scale,
    sums: list[Tensor | None],
    y: Tensor | None,
    grid: Grid,
    rounding: RoundingGradient,
    clamp: ClampGradient,
    gradient_scale: float,
) -> Tensor:
    """The gradient of x; those of scale and zero are added to `sums`. y: the rounded values, of
    which a copy is overwritten; None: those of rounding to nearest."""
    low, high = 0, grid.top
    v = grid.position(x, q)
    h, c = g, clamp.value(v, low, high)
    if not isinstance(rounding, Straight):
        h = rounding.back(c, g, high - low)
        if clamp.clips and not isinstance(clamp, Hard):  # whose slope is 0 there
            h = torch.lerp(g, h, inside(v, low, high))
    h = clamp.back(v, h, low, high)
    if clamp.limit is not None:
        h.mul_((x.abs() < clamp.limit).to(h))
    moves = None if clamp.steps_inside else 1 - inside(v, low, high)
    if sums[0] is not None:
        y = grid.decode(c.round_(), q) if y is None else y.clone()
        moved = y.mul_(g).addcmul_(h, x, value=-1)
        moved = moved if moves is None else moved.mul_(moves)
        sums[0] += gradient_scale * moved.sum_to_size(q.scale.shape) / q.scale
    if sums[1] is not None:
        moved = (h - g) if moves is None else (h - g).mul_(moves)
        sums[1] += gradient_scale * moved.sum_to_size(q.zero.shape) * q.scale
    return h


def _chunks(rows: Tensor) -> Iterator[slice]:
    """Row ranges small enough for the processor's cache and large enough to use all cores; on an
    accelerator one range of all rows."""
    size = max(CHUNK // rows.shape[1], 1) if rows.is_cpu else len(rows)
    for start in range(0, len(rows), size):
        yield slice(start, start + size)


def _placed(
    scale: Tensor, zero: Tensor, low: Tensor | None, high: Tensor | None, part: slice
) -> Scale:
    fitted = None if low is None or high is None else (_of(low, part), _of(high, part))
    return Scale(_of(scale, part), _of(zero, part), None, fitted)


def _of(each: Tensor, part: slice) -> Tensor:
    """The scales of these rows, or the one that all rows share."""
    return each if each.shape[0] == 1 else each[part]
