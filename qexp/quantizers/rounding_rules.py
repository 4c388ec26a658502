"""Scales of fake-quantized weights whose rounding is trained, by a variable per weight."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from qexp.common.errors import FieldError
from qexp.grid import Grid
from qexp.quantizers.fake_quantize import FakeQuantize
from qexp.quantizers.rounding_variable import Shifted, Soft
from qexp.quantizers.scale_rules import ScaleRule, single_level
from qexp.quantizers.weight import FakeWeight


@dataclass(frozen=True)
class SignRound(ScaleRule):
    """A rounding variable per weight and multipliers of each group's range (AutoRound, 2309.05516).

    The range is that of the grid's range estimator, and can only shrink.
    """

    has_rounding_variable = True

    def __call__(
        self, weight: Float[Tensor, "rows columns"], grid: Grid, fake_quantize: FakeQuantize
    ) -> FakeWeight:
        single_level(grid)
        return Shifted(grid, fake_quantize, weight.detach().float())


@dataclass(frozen=True)
class AdaRound(ScaleRule):
    """Up or down for each weight, trained as a soft choice (2004.10568); scales fitted once."""

    has_rounding_variable = True
    trains_scales = False

    def __call__(
        self, weight: Float[Tensor, "rows columns"], grid: Grid, fake_quantize: FakeQuantize
    ) -> FakeWeight:
        single_level(grid)
        return Soft(grid, weight.detach().float())


@dataclass(frozen=True)
class ProgressiveRounding(ScaleRule):
    """As `AdaRound`, decided stage by stage, with a factor between 0 and 2 of each scale (TesseraQ,
    2410.19103).

    shares: of weights that are undecided in each of as many stages of equal length. factor: whether
    scales have one; it trains with the rate of ranges.
    """

    shares: Sequence[float | int] = (0.75, 0.5, 0.375, 0.25, 0.125, 0.09, 0.06, 0.04, 0.02, 0.005)
    factor: bool = True
    has_rounding_variable = True

    def __post_init__(self) -> None:
        valid = all(type(share) in (int, float) and 0 <= share <= 1 for share in self.shares)
        if not self.shares or not valid or list(self.shares) != sorted(self.shares, reverse=True):
            raise FieldError(f"shares={self.shares}: give numbers from 1 to 0 that do not rise.")

    def __call__(
        self, weight: Float[Tensor, "rows columns"], grid: Grid, fake_quantize: FakeQuantize
    ) -> FakeWeight:
        single_level(grid)
        return Soft(grid, weight.detach().float(), self.factor, self.shares)
