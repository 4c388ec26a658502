"""Ranges narrowed by learned shares at both ends."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from qexp.grid.base import Grid, Interval, Range
from qexp.grid.observers import Observer


@dataclass(frozen=True)
class Shares(Range):
    """The interval of another estimator, each end times a number of its own."""

    inner: Range
    low: Float[Tensor, ""] | float
    high: Float[Tensor, ""] | float

    def check(self, grid: Grid) -> None:
        self.inner.check(grid)

    def observer(self, per_row: bool = False) -> Observer:
        return self.inner.observer(per_row)

    def __call__(
        self,
        x: Float[Tensor, "rows size"],
        grid: Grid,
        counts: Float[Tensor, "rows size"] | None = None,
    ) -> Interval:
        low, high = self.inner(x, grid, counts)
        return low * self.low, high * self.high
