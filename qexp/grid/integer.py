"""Integer grids: evenly spaced values, symmetric or with a zero point."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.common.errors import UserError
from qexp.grid.base import Grid, Range
from qexp.grid.even import EvenGrid
from qexp.grid.ranges import MinMax
from qexp.grid.row_multiples import row_multiples
from qexp.grid.scale import Scale, positive


@dataclass(frozen=True)
class IntGrid(EvenGrid):
    """Evenly spaced values: scale · (code - zero), code in 0 … 2^bits - 1. A value inside of the
    range goes to the nearest, at most half a step away (one where `scale_dtype` is coarse): the
    positive maximum of a symmetric grid lies half a step beyond the last code, either end of an
    asymmetric one up to half a step, as the zero point is rounded.

    symmetric: the full signed range of the GPTQ reference, scale = 2·max|x| / (2^bits - 1) and
    zero = 2^(bits-1). Asymmetric: scale = (max - min) / (2^bits - 1), zero = round(-min / scale).
    narrow: symmetric, with scale = max|x| / (2^(bits-1) - 1) (LLM-QAT, QuaRot), so that both ends
    of the range are codes; code 0 is left to values below it.
    include_zero: asymmetric ranges are widened to hold 0 (GPTQ does, SpQR does not).
    real_zero: zero points are not rounded (SpQR's default). Without it and a range that need not
    hold 0, one bit would leave 0 and a single other value, so that the least is two.
    scales, zeros: the grid of the scales or zero points of this grid.
    axis: of such a grid: its groups are adjacent rows within one group of columns ("outputs",
    SpQR's second level), or it has one scale for the scales of a row ("inputs", DGQ's), which are
    then whole multiples of it; see `row_multiples`.
    """

    bits: int = 4
    symmetric: bool = False
    narrow: bool = False
    group_size: int | None = None
    range: Range = MinMax()  # noqa: RUF009 (frozen: sharing the default is safe)
    per_tensor: bool = False
    scale_dtype: str = "float32"
    include_zero: bool = True
    real_zero: bool = False
    scales: "IntGrid | None" = None
    zeros: "IntGrid | None" = None
    axis: str = "outputs"

    def __post_init__(self) -> None:
        least = 1 if self.real_zero and not self.include_zero and not self.symmetric else 2
        if not isinstance(self.bits, int) or not least <= self.bits <= 16:
            raise UserError(f"bits={self.bits!r}: give a whole number from {least} to 16.")
        if self.narrow and not self.symmetric:
            raise UserError("narrow=true with symmetric=false: give symmetric=true as well.")
        if self.axis not in ("outputs", "inputs"):
            raise UserError(f"axis={self.axis} is unknown: give outputs or inputs.")
        if self.fits_whole_rows:
            own = self.scales
            plain = own is not None and own.symmetric and not own.narrow and own.group_size is None
            if not plain or self.real_zero or self.zeros is not None:
                raise UserError(
                    "weight.scales.axis=inputs: the scales of a row are whole multiples of one "
                    "number; give weight.scales.symmetric=true weight.scales.group_size=null "
                    "weight.real_zero=false weight.zeros=null."
                )
        if self.per_tensor and self.second_level:
            raise UserError("weight.scales, weight.zeros need weight.per_tensor=false.")
        self._check_scales()

    @property
    def second_level(self) -> dict[str, Grid]:
        grids = {"scales": self.scales, "zeros": None if self.symmetric else self.zeros}
        return {name: grid for name, grid in grids.items() if grid is not None}

    @property
    def has_zero(self) -> bool:
        return not self.symmetric

    @property
    def zero_bits(self) -> int:
        if self.symmetric:
            return 0
        return torch.finfo(self.stored_dtype).bits if self.real_zero else self.bits

    def scale_for(self, low: Float[Tensor, "rows 1"], high: Float[Tensor, "rows 1"]) -> Scale:
        low, high = low.float(), high.float()
        if self.symmetric:
            high = torch.maximum(low.abs(), high.abs())
            low = -high
        elif self.include_zero:
            low, high = low.clamp(max=0), high.clamp(min=0)
        # A constant row has no width: extend it to 0, and a row of zeros to [0, 1].
        constant = low == high
        low = torch.where(constant, low.clamp(max=0), low)
        high = torch.where(constant, high.clamp(min=0), high)
        high = torch.where(low == high, 1.0, high)
        width = (high - low) / (self.top - self.narrow)
        if self.real_zero:  # a zero point beyond its dtype would be infinite
            width = torch.maximum(width, low.abs() / torch.finfo(self.stored_dtype).max)
        scale = width if self.scales is not None else self.as_stored(width)
        if self.symmetric:
            zero = torch.full_like(scale, self.unstored_zero)
        elif self.real_zero and self.zeros is not None:
            zero = -low / scale
        else:
            zero = self.zero_as_stored(-low / scale)
        if not self.second_level or self.fits_whole_rows:  # or `along_rows` follows
            return Scale(scale, zero)
        # As in SpQR, zero points are computed from the scale before it is quantized.
        raw = {"scales": scale, "zeros": zero}
        quantized = raw | {
            n: g(raw[n].reshape(1, -1)).reshape(-1, 1) for n, g in self.second_level.items()
        }
        return Scale(positive(quantized["scales"]), quantized["zeros"], (scale, zero))

    def along_rows(
        self,
        q: Scale,
        x: Float[Tensor, "rows columns"],
        counts: Float[Tensor, "rows columns"] | None,
    ) -> Scale:
        if self.scales is None or not self.fits_whole_rows:
            return q
        return row_multiples(self, self.scales, q, x, counts)

    def zero_as_stored(self, zero: Float[Tensor, "*rows each"]) -> Float[Tensor, "*rows each"]:
        if not self.real_zero:
            return zero.round().clamp(0, self.top)
        limit = torch.finfo(self.stored_dtype).max
        return zero.clamp(-limit, limit).to(self.stored_dtype).float()
