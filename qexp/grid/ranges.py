"""The interval a grid must cover: range estimators.

Each is called with the values of every row and, when those are histogram bins, how often each
occurs, so that one estimator serves weights and streamed activations. `stream` is what gathers the
latter.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qexp.common.errors import check_int, check_positive, check_range
from qexp.grid.base import Grid, Interval, Range
from qexp.grid.observers import MinMaxObserver, Observer

EMPTY = 1e-4  # how often a value occurs where none was seen


def _seen(x: Tensor, counts: Tensor | None, empty: float) -> Tensor:
    return x if counts is None else torch.where(counts > 0, x, empty)


@dataclass(frozen=True)
class MinMax(Range):
    """Everything. Of the very values that are rounded (a dynamic range) nothing is clipped: each
    goes to the nearest code, with a gradient of 1 at both ends too."""

    def __call__(
        self,
        x: Float[Tensor, "rows size"],
        grid: Grid,
        counts: Float[Tensor, "rows size"] | None = None,
    ) -> Interval:
        low = _seen(x, counts, torch.inf).amin(1, keepdim=True)
        return low, _seen(x, counts, -torch.inf).amax(1, keepdim=True)

    def observer(self) -> Observer:
        return MinMaxObserver()


@dataclass(frozen=True)
class MovingAverage(Range):
    """Min-max of each tensor, averaged over a stream of them; `momentum` is the share that the past
    keeps when the next tensor comes. Of a single tensor it is min-max."""

    momentum: float = 0.9

    def __post_init__(self) -> None:
        check_range("range", self, "a number from 0 to below 1", lambda x: 0 <= x < 1, "momentum")

    def __call__(
        self,
        x: Float[Tensor, "rows size"],
        grid: Grid,
        counts: Float[Tensor, "rows size"] | None = None,
    ) -> Interval:
        return MinMax()(x, grid, counts)

    def observer(self) -> Observer:
        return MinMaxObserver(self.momentum)


@dataclass(frozen=True)
class Percentile(Range):
    """The central share of values: `share` per cent lies at or below the upper end, and as much
    at or above the lower one. Ends are values that occur (no interpolation)."""

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
    """Shrink the min-max interval towards 0 until sum |x - Q(x)|^norm is least.

    The search of the GPTQ reference: `steps` equal steps down to 1 - shrink of the full interval,
    with norm 2.4. The plain mean square error is norm 2.
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
        low, high = MinMax()(x, grid, counts)
        best = torch.full_like(low, torch.inf)
        best_low, best_high = low, high
        for step in range(int(self.shrink * self.steps)):
            keep = 1 - step / self.steps
            q = grid.scale_for(low * keep, high * keep)
            error = (grid.round(x, q) - x).abs().pow(self.norm)
            error = (error if counts is None else error * counts).sum(1, keepdim=True)
            better = error < best
            best = torch.where(better, error, best)
            best_low = torch.where(better, low * keep, best_low)
            best_high = torch.where(better, high * keep, best_high)
        return best_low, best_high


@dataclass(frozen=True)
class RMS(Range):
    """As many root mean squares to both sides of 0 (QuIP's 2.4, for weights made normal)."""

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
    """The clipping that keeps the most of the distribution: TensorRT's calibrator.

    Over a histogram of `bins` bins, each candidate T clips to [-T, T]; of what it keeps, with the
    clipped mass in the outermost bins, the divergence (KL) from its rounded form is measured, in
    which the bins of one code share their mass evenly where there was any. `stride`: bins from one
    candidate to the next, of which those with no more bins than codes would lose nothing.
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
        ends = [self._row(*row, grid) for row in zip(x, weight, low, high, strict=True)]
        kept = torch.stack(ends).to(low)
        return torch.maximum(low, -kept[:, None]), torch.minimum(high, kept[:, None])

    def _row(self, x: Tensor, counts: Tensor, low: Tensor, high: Tensor, grid: Grid) -> Tensor:
        """The best T of one row."""
        width = (high - low) / self.bins
        widest = torch.maximum(low.abs(), high.abs())
        if width == 0:
            return widest[0]
        index = ((x - low) / width).long().clamp(0, self.bins - 1)
        mass = torch.bincount(index, counts.double(), self.bins)
        centers = low + (torch.arange(self.bins, device=x.device) + 0.5) * width
        best, kept = torch.inf, widest
        for step in range(0, self.bins, self.stride):
            end = widest - step * width
            inside = (centers >= -end) & (centers <= end)
            if int(inside.sum()) <= 2**grid.bits and step:
                break
            q = grid.scale_for(low.clamp(min=-end)[None], high.clamp(max=end)[None])
            divergence = _divergence(mass, inside, grid.encode(centers[None], q)[0].long())
            if divergence < best:
                best, kept = divergence, end
        return kept[0]


def _divergence(
    mass: Float[Tensor, " bins"], inside: Bool[Tensor, " bins"], codes: Int[Tensor, " bins"]
) -> float:
    """KL from what is inside, the rest added to its ends, to the same with one height per code."""
    own, codes = mass[inside], codes[inside]
    clipped = own.clone()
    first, last = (int(i) for i in inside.nonzero()[[0, -1], 0])
    clipped[0] += mass[:first].sum()
    clipped[-1] += mass[last + 1 :].sum()
    filled = (own > 0).double()
    heights = torch.bincount(codes, own) / torch.bincount(codes, filled).clamp(min=1)
    # Clipped mass may fall on a bin that had none; MXNet's smoothing keeps that finite.
    rounded = torch.where(own > 0, heights[codes], EMPTY)
    there = clipped > 0
    p, q = clipped[there] / clipped.sum(), rounded[there] / rounded.sum()
    return float((p * (p / q).log()).sum())
