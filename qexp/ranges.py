"""The interval a grid must cover: range estimators.

Each is called with the values of every row and, when those are histogram bins, how often each
occurs, so that one estimator serves weights and streamed activations.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from qexp.grid import Grid

Interval = tuple[Float[Tensor, "rows 1"], Float[Tensor, "rows 1"]]


class Range(ABC):
    @abstractmethod
    def __call__(
        self,
        x: Float[Tensor, "rows size"],
        grid: "Grid",
        counts: Float[Tensor, "rows size"] | None = None,
    ) -> Interval:
        """The lowest and the highest value of each row that the grid should reach."""


def _seen(x: Tensor, counts: Tensor | None, empty: float) -> Tensor:
    return x if counts is None else torch.where(counts > 0, x, empty)


@dataclass(frozen=True)
class MinMax(Range):
    """Everything: nothing is clipped."""

    def __call__(
        self,
        x: Float[Tensor, "rows size"],
        grid: "Grid",
        counts: Float[Tensor, "rows size"] | None = None,
    ) -> Interval:
        low = _seen(x, counts, torch.inf).amin(1, keepdim=True)
        return low, _seen(x, counts, -torch.inf).amax(1, keepdim=True)


@dataclass(frozen=True)
class Percentile(Range):
    """The central share of values: `share` per cent lies at or below the upper end, and as much
    at or above the lower one. Ends are values that occur (no interpolation)."""

    share: float = 99.9

    def __call__(
        self,
        x: Float[Tensor, "rows size"],
        grid: "Grid",
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

    def __call__(
        self,
        x: Float[Tensor, "rows size"],
        grid: "Grid",
        counts: Float[Tensor, "rows size"] | None = None,
    ) -> Interval:
        low, high = MinMax()(x, grid, counts)
        best = torch.full_like(low, torch.inf)
        best_low, best_high = low, high
        for step in range(int(self.shrink * self.steps)):
            keep = 1 - step / self.steps
            q = grid.span(low * keep, high * keep)
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

    reach: float = 2.4

    def __call__(
        self,
        x: Float[Tensor, "rows size"],
        grid: "Grid",
        counts: Float[Tensor, "rows size"] | None = None,
    ) -> Interval:
        weight = torch.ones_like(x) if counts is None else counts
        mean = (x.square() * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
        high = self.reach * mean.sqrt()
        return -high, high
