"""Scales and zero points of a grid, and the number of groups in a row."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.common.errors import UserError

# Dtypes of stored numbers, by their names in a configuration.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Scale(NamedTuple):
    """Scale and zero point of a grid: value = scale · (code - zero).

    raw: scale and zero as they were before a second grid rounded them, from which storage derives
    the second level once more; for a second level along the inputs the scale of the row's scales
    in place of theirs. None where there is none.
    fitted: the interval [low, high] that the grid was fitted to. Where the fit was to the very
    values that are rounded (a dynamic range), it decides what is clipped. None, as for scales that
    train or are fixed, leaves that to the codes.
    """

    scale: Float[Tensor, "*rows groups"]
    zero: Float[Tensor, "*rows groups"]
    raw: tuple[Float[Tensor, "*rows groups"], Float[Tensor, "*rows groups"]] | None = None
    fitted: tuple[Float[Tensor, "*rows groups"], Float[Tensor, "*rows groups"]] | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> "Scale":
        """The same change (reshape, expand, permute) applied to all tensors."""
        raw = None if self.raw is None else (change(self.raw[0]), change(self.raw[1]))
        fitted = None
        if self.fitted is not None:
            fitted = change(self.fitted[0]), change(self.fitted[1])
        return Scale(change(self.scale), change(self.zero), raw, fitted)

    @staticmethod
    def join(parts: "list[Scale]") -> "Scale":
        """Scales of several groups [rows, 1] side by side."""
        pairs = [
            [pair for pair in found if pair is not None]
            for found in ([part.raw for part in parts], [part.fitted for part in parts])
        ]
        raw, fitted = (
            (torch.cat([p[0] for p in each], 1), torch.cat([p[1] for p in each], 1))
            if each
            else None
            for each in pairs
        )
        return Scale(
            torch.cat([part.scale for part in parts], 1),
            torch.cat([part.zero for part in parts], 1),
            raw,
            fitted,
        )


def positive(scale: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Scales as decoding uses them: second-level rounding may make some zero or negative."""
    return scale.clamp(min=torch.finfo(torch.float32).tiny)


def cut(length: int, size: int | None, key: str, what: str) -> int:
    """Number of groups of `size` in `length`; None is one. UserError when it is no divisor."""
    if size is None:
        return 1
    if size < 1 or length % size:
        raise UserError(
            f"{key}={size} does not divide the {length} {what} of a layer: choose a divisor of "
            f"{length}, or null for one group."
        )
    return length // size
