"""Base of grids whose values are evenly spaced."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.common.errors import UserError
from qexp.grid.base import Grid
from qexp.grid.clipping import Clamp, Rounding, snap
from qexp.grid.scale import DTYPES, Scale


class EvenGrid(Grid):
    """scale · (code - zero), code in 0 … top, for subclasses with a scale per row and, unless they
    say otherwise, 2^bits codes and the fixed zero point in their middle, 2^(bits-1)."""

    def with_bits(self, bits: int) -> "EvenGrid":
        return replace(self, bits=bits)  # type: ignore[type-var]

    @property
    def top(self) -> int:
        return 2**self.bits - 1

    @property
    def bounds(self) -> tuple[float, float]:
        return 0.0, float(self.top)

    @property
    def has_zero(self) -> bool:
        return False

    @property
    def unstored_zero(self) -> float:
        return 2.0 ** (self.bits - 1)

    @property
    def second_level(self) -> dict[str, Grid]:
        return {}

    def encode(
        self,
        x: Float[Tensor, "*shape"],
        q: Scale,
        rounding: Rounding = torch.round,
        clamp: Clamp = torch.clamp,
    ) -> Float[Tensor, "*shape"]:
        if clamp is torch.clamp and not x.requires_grad:  # then the interval makes no difference
            q = q._replace(fitted=None)
        return snap(self.position(x, q), self.top, rounding, clamp)

    def decode(self, codes: Float[Tensor, "*shape"], q: Scale) -> Float[Tensor, "*shape"]:
        return (codes - q.zero) * q.scale

    def _check_scales(self) -> None:
        """UserError for an unknown `scale_dtype`, or a group size next to a single scale."""
        if self.scale_dtype not in DTYPES:
            raise UserError(
                f"scale_dtype={self.scale_dtype} is unknown: give {' or '.join(DTYPES)}."
            )
        if self.per_tensor and self.group_size is not None:
            raise UserError(
                f"per_tensor=true with group_size={self.group_size}: a single scale has no "
                "groups; give null (weight.per_tensor=true needs weight.group_size=null)."
            )
