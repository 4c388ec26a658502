"""Grids with scales that have a sign: llama.cpp's Q4_0, Q5_0 and Q8_0, AutoRound's full range."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.common.errors import UserError
from qexp.grid.base import Grid, Interval, Range
from qexp.grid.clipping import Clamp, Rounding
from qexp.grid.even import EvenGrid
from qexp.grid.scale import Scale

TYPES = {4: "Q4_0", 5: "Q5_0", 8: "Q8_0"}


@dataclass(frozen=True)
class Extreme(Range):
    """The value of the largest magnitude, the first of several, and the other end that it leaves
    to a grid whose lowest code it becomes: 7/8 of it at 4 bits, with the opposite sign."""

    def __call__(
        self,
        x: Float[Tensor, "rows size"],
        grid: Grid,
        counts: Float[Tensor, "rows size"] | None = None,
    ) -> Interval:
        seen = x if counts is None else torch.where(counts > 0, x, 0.0)
        extreme = seen.gather(1, seen.abs().argmax(1, keepdim=True))
        other = -extreme * ((grid.top - 1) / (grid.top + 1))
        return torch.minimum(extreme, other), torch.maximum(extreme, other)


@dataclass(frozen=True)
class BlockGrid(EvenGrid):
    """scale · (code - 2^(bits-1)), with a float16 scale that may be negative.

    2 to 5 bits: scale = extreme / -2^(bits-1), so that the value of the largest magnitude is code
    0, whatever its sign; at 2 and 3 bits llama.cpp has no such type, and AutoRound's symmetric grid
    (2309.05516, its code) is that of every width. 8 bits: scale = max|x| / 127. A group of zeros
    has the scale 0.

    Values that the scale was fitted to go to the codes that ggml's reference quantization gives
    them (ggml-quants.c, `quantize_row_q*_ref`): by the scale before it is rounded to float16, with
    ties upwards, at 8 bits away from 0. All others go to the nearest stored value.

    group_size: 32 is llama.cpp's block; a multiple repeats scales in a GGUF file.
    """

    bits: int = 4
    group_size: int | None = 32
    range: Range = Extreme()
    per_tensor: bool = False
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, *TYPES):
            known = ", ".join(f"{bits} ({name})" for bits, name in TYPES.items())
            raise UserError(
                f"bits={self.bits!r}: llama.cpp's blocks have {known} bits, and 2 or 3 follow the "
                "formula of 4."
            )
        if self.scale_dtype != "float16" or self.per_tensor:
            raise UserError(
                "weight=gguf: llama.cpp's blocks have one float16 scale each; give "
                "weight.scale_dtype=float16 weight.per_tensor=false."
            )

    def scale_for(self, low: Float[Tensor, "rows 1"], high: Float[Tensor, "rows 1"]) -> Scale:
        scale = self.as_stored(self._step(low.float(), high.float()))
        return Scale(scale, torch.full_like(scale, self.unstored_zero))

    def _step(self, low: Tensor, high: Tensor) -> Tensor:
        """The scale before it is rounded."""
        if self.bits == 8:
            return torch.maximum(low.abs(), high.abs()) / 127
        step = torch.where(low.abs() >= high.abs(), low, high) / -self.unstored_zero
        return torch.where(step == 0, -0.0, step)

    def as_stored(self, scale: Float[Tensor, "*rows each"]) -> Float[Tensor, "*rows each"]:
        limit = torch.finfo(self.stored_dtype).max
        stored = scale.detach().clamp(-limit, limit).to(self.stored_dtype).to(scale.dtype)
        return stored + (scale - scale.detach()) if scale.requires_grad else stored

    def encode(
        self,
        x: Float[Tensor, "*shape"],
        q: Scale,
        rounding: Rounding = torch.round,
        clamp: Clamp = torch.clamp,
    ) -> Float[Tensor, "*shape"]:
        if rounding is not torch.round or clamp is not torch.clamp or x.requires_grad:
            return super().encode(x, q, rounding, clamp)
        step = q.scale if q.fitted is None else self._step(*q.fitted)
        v = x.float() * torch.where(step == 0, 0.0, 1 / step)
        if self.bits == 8:
            size = v.abs().floor()
            codes = v.sign() * (size + (2 * (v.abs() - size)).floor()) + self.unstored_zero
        else:
            codes = (v + (self.unstored_zero + 0.5)).floor()
        return codes.clamp(0, self.top).to(x.dtype)

    def code_position(self, v: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return torch.where(v.isfinite(), v, self.unstored_zero)  # of a group of zeros

    def clip(self, x: Float[Tensor, "*shape"], q: Scale) -> Float[Tensor, "*shape"]:
        ends = [(bound - q.zero) * q.scale for bound in self.bounds]
        return x.clamp(torch.minimum(*ends), torch.maximum(*ends))
