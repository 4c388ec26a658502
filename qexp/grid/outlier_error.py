"""Quantization error that outliers cause by widening the range of a static grid.

2403.06497 reports that it is 65 % of the error on average; its definition was not accessible.

With R the whole range of a tensor and R_k its part within k standard deviations of the mean:

    total   = |x - Q_R(x)|²
    inlier  = |x - Q_R_k(x)|² over the inliers: the error if there were no outliers
    range   = |x - Q_R(x)|² over the inliers, minus inlier
    outlier = |x - Q_R(x)|² over the outliers

Then total = inlier + range + outlier. The paper's share is range / total.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.grid.base import Grid
from qexp.grid.scale import Scale


@dataclass
class Moments:
    """Count, sum, sum of squares and bounds of a stream of tensors, in float64."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    low: float = torch.inf
    high: float = -torch.inf

    def add(self, x: Float[Tensor, "..."]) -> None:
        x = x.detach()
        low, high = (float(bound) for bound in x.aminmax())
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.count += x.numel()
        x = x.double()
        self.total += float(x.sum())
        self.squares += float(x.square().sum())

    @property
    def mean(self) -> float:
        return self.total / self.count

    @property
    def deviation(self) -> float:
        return max(self.squares / self.count - self.mean**2, 0.0) ** 0.5

    def inliers(self, k: float) -> tuple[float, float]:
        """The bounds of R_k, limited to those of the tensor."""
        width = k * self.deviation
        return max(self.mean - width, self.low), min(self.mean + width, self.high)


class Errors(NamedTuple):
    """Sums of squares over a tensor (errors; signal: the inliers), and the number of outliers."""

    total: float = 0.0
    inlier: float = 0.0
    range: float = 0.0
    outlier: float = 0.0
    signal: float = 0.0
    outliers: int = 0

    def plus(self, other: "Errors") -> "Errors":
        return Errors._make(a + b for a, b in zip(self, other, strict=True))

    @property
    def share(self) -> float:
        """The paper's share: the range term as a fraction of the total error."""
        return self.range / self.total if self.total else 0.0

    @property
    def noise(self) -> float:
        """The range term relative to the power of the inliers."""
        return self.range / self.signal if self.signal else 0.0


def decompose(x: Float[Tensor, "..."], moments: Moments, grid: Grid, k: float) -> Errors:
    """The errors of a tensor on a static per-tensor `grid`, given the moments of all tensors."""
    low, high = moments.inliers(k)
    x = x.detach().float().flatten()
    inside = (x >= low) & (x <= high)
    whole, narrow = _scale(grid, moments.low, moments.high, x), _scale(grid, low, high, x)
    error = (grid.round(x, whole) - x).double().square()
    narrow_error = (grid.round(x, narrow) - x).double().square()
    on_inliers, inlier = float(error[inside].sum()), float(narrow_error[inside].sum())
    outlier = float(error[~inside].sum())
    return Errors(
        on_inliers + outlier,
        inlier,
        on_inliers - inlier,
        outlier,
        float(x[inside].double().square().sum()),
        int((~inside).sum()),
    )


def _scale(grid: Grid, low: float, high: float, x: Tensor) -> Scale:
    q = grid.scale_for(x.new_tensor([[low]]), x.new_tensor([[high]]))
    return q.map(lambda part: part.reshape(1))
