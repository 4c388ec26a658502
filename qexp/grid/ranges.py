"""Range estimators: the interval that a grid must cover.

Each is called with the values of every row and, for histogram bins, how often each occurs. So one
estimator serves weights and activations; an `observer` collects the values of the latter.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qexp.common.errors import check_int, check_positive, check_range
from qexp.grid.base import Grid, Interval, Range
from qexp.grid.least_error import least_error, multiples
from qexp.grid.observers import MinMaxObserver, Observer, RowObserver

EMPTY = 1e-4  # count of a histogram bin without values


def _seen(x: Tensor, counts: Tensor | None, empty: float) -> Tensor:
    return x if counts is None else torch.where(counts > 0, x, empty)


@dataclass(frozen=True)
class MinMax(Range):
    """Everything. Of the very values that are rounded (a dynamic range) nothing is clipped: each
    goes to the nearest code, with a gradient of 1 at both ends too.

    keep: share of the interval that is left at both ends (MagR: 0.8 at 2 bits, 0.9 at 3).
    """

    keep: float | int = 1.0

    def __post_init__(self) -> None:
        check_range("range", self, "a number above 0 and at most 1", lambda x: 0 < x <= 1, "keep")

    def __call__(
        self,
        x: Float[Tensor, "rows size"],
        grid: Grid,
        counts: Float[Tensor, "rows size"] | None = None,
    ) -> Interval:
        low = _seen(x, counts, torch.inf).amin(1, keepdim=True)
        high = _seen(x, counts, -torch.inf).amax(1, keepdim=True)
        return (low, high) if self.keep == 1 else (low * self.keep, high * self.keep)

    def observer(self, per_row: bool = False) -> Observer:
        return RowObserver() if per_row else MinMaxObserver()


class OfStream(Range):
    """Of a single tensor the min-max interval. What makes it another range is its observer, of a
    stream of tensors."""

    def __call__(
        self,
        x: Float[Tensor, "rows size"],
        grid: Grid,
        counts: Float[Tensor, "rows size"] | None = None,
    ) -> Interval:
        return MinMax()(x, grid, counts)


@dataclass(frozen=True)
class MovingAverage(OfStream):
    """Moving average of the min-max interval over a stream of tensors; min-max of a single tensor.

    momentum: weight of the average so far when a new tensor is observed.
    """

    momentum: float = 0.9

    def __post_init__(self) -> None:
        check_range("range", self, "a number from 0 to below 1", lambda x: 0 <= x < 1, "momentum")

    def observer(self, per_row: bool = False) -> Observer:
        return MinMaxObserver(self.momentum)


@dataclass(frozen=True)
class Percentile(Range):
    """The central part of the values: `share` per cent of them are at most the upper bound, and as
    many are at least the lower bound. Bounds are values that occur (no interpolation)."""

    share: float = 99.9

    def __post_init__(self) -> None:
        right = "a number of per cent, above 50 and at most 100 (99.9, not 0.999)"
        check_range("range", self, right, lambda x: 50 < x <= 100, "share")

    def __call__(
        self,
        x: Float[Tensor, "rows size"],
        grid: Grid,
        counts: Float[Tensor, "rows size"] | None = None,
    ) -> Interval:
        order = x.sort(dim=1)
        weight = torch.ones_like(x) if counts is None else counts.gather(1, order.indices)
        below = weight.double().cumsum(1)
        total = below[:, -1:]

        def at(share: float) -> Tensor:
            index = torch.searchsorted(below, total * share)
            return order.values.gather(1, index.clamp(max=x.shape[1] - 1))

        return at(1 - self.share / 100 + 1e-12), at(self.share / 100)


@dataclass(frozen=True)
class MSE(Range):
    """The min-max interval, shrunk towards 0 so that sum |x - Q(x)|^norm is smallest.

    The search of the GPTQ reference: `steps` equal steps down to 1 - shrink of the full interval,
    with norm 2.4. Norm 2 gives the mean squared error.
    """

    norm: float = 2.4
    steps: int = 100
    shrink: float = 0.8

    def __post_init__(self) -> None:
        check_int("range", self, steps=1)
        check_range("range", self, "a number above 0 and at most 1", lambda x: 0 < x <= 1, "shrink")
        check_positive("range", self, "norm")

    def __call__(
        self,
        x: Float[Tensor, "rows size"],
        grid: Grid,
        counts: Float[Tensor, "rows size"] | None = None,
    ) -> Interval:
        shares = (1 - step / self.steps for step in range(int(self.shrink * self.steps)))
        full = MinMax()(x, grid, counts)
        return least_error(full, multiples(shares), x, grid, counts, self.norm)


@dataclass(frozen=True)
class RMS(Range):
    """± `clip_at` root mean squares (QuIP: 2.4, for rotated, nearly normal weights)."""

    clip_at: float = 2.4

    def __post_init__(self) -> None:
        check_positive("range", self, "clip_at")

    def __call__(
        self,
        x: Float[Tensor, "rows size"],
        grid: Grid,
        counts: Float[Tensor, "rows size"] | None = None,
    ) -> Interval:
        weight = torch.ones_like(x) if counts is None else counts
        mean = (x.square() * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
        high = self.clip_at * mean.sqrt()
        return -high, high


@dataclass(frozen=True)
class Entropy(Range):
    """Clipping with the least KL divergence: TensorRT's entropy calibrator.

    Each candidate T clips a histogram of `bins` bins to [-T, T] and adds the clipped mass to the
    outermost bins. Its divergence is measured from the rounded histogram, in which the non-empty
    bins of one code share their mass evenly. stride: bins between two candidates. The search ends
    where a candidate has no more bins than codes, since such a one would lose nothing.
    """

    bins: int = 2048
    stride: int = 8

    def __post_init__(self) -> None:
        check_int("range", self, bins=1, stride=1)

    def __call__(
        self,
        x: Float[Tensor, "rows size"],
        grid: Grid,
        counts: Float[Tensor, "rows size"] | None = None,
    ) -> Interval:
        low, high = MinMax()(x, grid, counts)
        weight = torch.ones_like(x) if counts is None else counts
        rows = [self._row(*row, grid) for row in zip(x, weight, low, high, strict=True)]
        clip_at = torch.stack(rows).to(low)[:, None]
        return torch.maximum(low, -clip_at), torch.minimum(high, clip_at)

    def _row(self, x: Tensor, counts: Tensor, low: Tensor, high: Tensor, grid: Grid) -> Tensor:
        """The best T of one row, on the host."""
        width = (high - low) / self.bins
        widest = torch.maximum(low.abs(), high.abs())
        if width == 0:
            return widest[0].cpu()
        index = ((x - low) / width).long().clamp(0, self.bins - 1)
        mass = torch.bincount(index, counts.double(), self.bins).cpu()
        # Every candidate ends in a comparison on the host.
        low, high, width, widest = (each.cpu() for each in (low, high, width, widest))
        centers = low + (torch.arange(self.bins) + 0.5) * width
        best, clip_at = torch.inf, widest
        for step in range(0, self.bins, self.stride):
            end = widest - step * width
            inside = (centers >= -end) & (centers <= end)
            if int(inside.sum()) <= 2**grid.bits and step:
                break
            q = grid.scale_for(low.clamp(min=-end)[None], high.clamp(max=end)[None])
            divergence = _divergence(mass, inside, grid.encode(centers[None], q)[0].long())
            if divergence < best:
                best, clip_at = divergence, end
        return clip_at[0]


def _divergence(
    mass: Float[Tensor, " bins"], inside: Bool[Tensor, " bins"], codes: Int[Tensor, " bins"]
) -> float:
    """KL divergence of the clipped histogram from the same with one height per code."""
    unclipped, codes = mass[inside], codes[inside]
    clipped = unclipped.clone()
    first, last = (int(i) for i in inside.nonzero()[[0, -1], 0])
    clipped[0] += mass[:first].sum()
    clipped[-1] += mass[last + 1 :].sum()
    filled = (unclipped > 0).double()
    heights = torch.bincount(codes, unclipped) / torch.bincount(codes, filled).clamp(min=1)
    # Clipped mass may be added to an empty bin; MXNet's smoothing keeps the divergence finite.
    rounded = torch.where(unclipped > 0, heights[codes], EMPTY)
    support = clipped > 0
    p, q = clipped[support] / clipped.sum(), rounded[support] / rounded.sum()
    return float((p * (p / q).log()).sum())
