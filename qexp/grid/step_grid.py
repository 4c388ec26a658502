"""Grids of a few evenly spaced values on both sides of 0: binary, ternary, mid-rise."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.common.errors import UserError
from qexp.grid.base import Grid, Interval, Range
from qexp.grid.even import EvenGrid
from qexp.grid.ranges import MinMax
from qexp.grid.scale import Scale


@dataclass(frozen=True)
class StepGrid(EvenGrid):
    """scale · (code - (L - 1) / 2), code in 0 … L - 1: L values, of which 0 is one if L is odd.

    The range reaches half a step beyond the outermost values, scale = 2·max|x| / L, so that no
    value lies more than half a step from its code. With learned scales it is stretched elastic
    quantization (SEQ in ParetoQ, 2502.02631) for 4 and 3 values, with its a = L / 2 · scale; with
    the range `MeanMagnitude` and one scale per matrix, 3 values are BitNet b1.58's (2402.17764).

    Storage: three values take 1.6 bits, five codes in a byte; their information content, log2 3, is
    reported as paper bits.
    """

    levels: int = 4
    group_size: int | None = None
    range: Range = MinMax()  # noqa: RUF009 (frozen: sharing the default is safe)
    per_tensor: bool = False
    scale_dtype: str = "float32"

    def __post_init__(self) -> None:
        if type(self.levels) is not int or not 2 <= self.levels <= 256:
            raise UserError(f"levels={self.levels}: give a whole number from 2 to 256.")
        self._check_scales()

    def with_bits(self, bits: int) -> "StepGrid":
        return replace(self, levels=2**bits)

    @property
    def bits(self) -> int:
        return self.top.bit_length()

    @property
    def code_bits(self) -> float:
        return 1.6 if self.levels == 3 else float(self.bits)

    @property
    def top(self) -> int:
        return self.levels - 1

    @property
    def unstored_zero(self) -> float:
        return self.top / 2

    def scale_for(self, low: Float[Tensor, "rows 1"], high: Float[Tensor, "rows 1"]) -> Scale:
        reach = torch.maximum(low.abs(), high.abs()).float()
        scale = self.as_stored(torch.where(reach == 0, 1.0, 2 / self.levels * reach))
        return Scale(scale, torch.full_like(scale, self.unstored_zero))


@dataclass(frozen=True)
class MeanMagnitude(Range):
    """The interval of a `StepGrid` whose step is the mean magnitude (BitNet b1.58, 2402.17764)."""

    def check(self, grid: Grid) -> None:
        if not isinstance(grid, StepGrid):
            raise UserError(
                "weight/range=mean: its interval is that of a step; give weight=ternary or "
                "weight=seq."
            )

    def __call__(
        self,
        x: Float[Tensor, "rows size"],
        grid: Grid,
        counts: Float[Tensor, "rows size"] | None = None,
    ) -> Interval:
        weight = torch.ones_like(x) if counts is None else counts
        mean = (x.abs() * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
        reach = (grid.top + 1) / 2 * mean
        return -reach, reach


@dataclass(frozen=True)
class LeastSquares(Range):
    """The interval of a `StepGrid` of two or three values whose step minimizes Σ (x - Q(x))² of
    each row (the least-squares binary quantization of PARQ, 2503.15748): ±s/2 with the mean
    magnitude, or the mean of the k largest magnitudes with the k that keeps most of Σ x²."""

    def check(self, grid: Grid) -> None:
        if not isinstance(grid, StepGrid) or grid.levels > 3:
            raise UserError(
                "weight/range=least_squares: its interval is that of two or three evenly spaced "
                "values; give weight=seq weight.levels=2 or 3, or weight/range=mse."
            )

    def __call__(
        self,
        x: Float[Tensor, "rows size"],
        grid: Grid,
        counts: Float[Tensor, "rows size"] | None = None,
    ) -> Interval:
        weight = torch.ones_like(x) if counts is None else counts
        magnitudes, order = x.abs().sort(dim=1, descending=True)
        mass = weight.gather(1, order).double()
        moment = (mass * magnitudes).cumsum(1)
        mass = mass.cumsum(1).clamp(min=torch.finfo(torch.float64).tiny)
        last = torch.full_like(order[:, :1], x.shape[1] - 1)
        best = (moment.square() / mass).argmax(1, keepdim=True) if grid.top == 2 else last
        mean = (moment.gather(1, best) / mass.gather(1, best)).to(x)
        reach = (grid.top + 1) / 2 * mean * (1 if grid.top == 2 else 2)
        return -reach, reach
