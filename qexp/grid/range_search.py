"""Range searches over zero points and to both sides of the min-max range; binarization's range."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.common.errors import UserError, check_int, check_positive, check_range
from qexp.grid.base import Grid, Interval, Range
from qexp.grid.least_error import least_error, multiples
from qexp.grid.ranges import MinMax


@dataclass(frozen=True)
class WidthAndZero(Range):
    """The interval with the least sum |x - Q(x)|^norm among `steps` widths, up to that of the
    min-max range, each at every integer zero point (the code of OWQ, 2306.02272).

    It takes 2^bits times as many trials as `MSE`, which keeps the zero point of the min-max range.
    """

    norm: float = 2.4
    steps: int = 100

    def __post_init__(self) -> None:
        check_int("range", self, steps=1)
        check_positive("range", self, "norm")

    def check(self, grid: Grid) -> None:
        needed = {"real_zero": False, "include_zero": True, "symmetric": False}
        if any(getattr(grid, name, None) != value for name, value in needed.items()):
            raise UserError(
                "weight/range=mse_zero: it tries every integer zero point, so that the interval "
                "holds 0; give weight.symmetric=false weight.real_zero=false "
                "weight.include_zero=true on weight=int or weight=channel."
            )

    def __call__(
        self,
        x: Float[Tensor, "rows size"],
        grid: Grid,
        counts: Float[Tensor, "rows size"] | None = None,
    ) -> Interval:
        def trials(low: Tensor, high: Tensor) -> Iterator[Interval]:
            whole = high.clamp(min=0) - low.clamp(max=0)
            for step in range(1, self.steps + 1):
                width = whole * (step / self.steps)
                for zero in range(grid.top + 1):
                    start = -width * (zero / grid.top)
                    yield start, start + width

        return least_error(MinMax()(x, grid, counts), trials, x, grid, counts, self.norm)


@dataclass(frozen=True)
class Around(Range):
    """The interval with the least sum |x - Q(x)|^norm among multiples of the min-max range, from
    1 - reach to 1 + reach in `steps` equal steps to either side (SliM-LLM, 2405.14917).

    The paper weighs the errors of salient weights; its code does so by 1, which is this.
    """

    norm: float = 2.4
    steps: int = 50
    reach: float = 0.1

    def __post_init__(self) -> None:
        check_int("range", self, steps=1)
        check_range("range", self, "a number above 0 and below 1", lambda x: 0 < x < 1, "reach")
        check_positive("range", self, "norm")

    def __call__(
        self,
        x: Float[Tensor, "rows size"],
        grid: Grid,
        counts: Float[Tensor, "rows size"] | None = None,
    ) -> Interval:
        moves = [self.reach * step / self.steps for step in range(1, self.steps + 1)]
        factors = [1.0, *(1 + move for move in moves), *(1 - move for move in moves)]
        full = MinMax()(x, grid, counts)
        return least_error(full, multiples(factors), x, grid, counts, self.norm)


@dataclass(frozen=True)
class TwoValues(Range):
    """Mean ± mean absolute deviation: the interval whose ends are the two values of binarization.

    centred: otherwise mean ± mean absolute value (a quirk of SliM-LLM's code).
    """

    centred: bool = True

    def __call__(
        self,
        x: Float[Tensor, "rows size"],
        grid: Grid,
        counts: Float[Tensor, "rows size"] | None = None,
    ) -> Interval:
        weight = torch.ones_like(x) if counts is None else counts
        total = weight.sum(1, keepdim=True)
        mean = (x * weight).sum(1, keepdim=True) / total
        deviation = (x - mean if self.centred else x).abs()
        reach = (deviation * weight).sum(1, keepdim=True) / total
        return mean - reach, mean + reach
