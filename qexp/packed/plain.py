"""Stored form of matrices that keep floating-point values."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qexp.packed.base import Packed


@dataclass(frozen=True)
class Plain(Packed):
    """A number per weight, in its stored dtype (float32, float16 or bfloat16)."""

    values: Float[Tensor, "rows columns"]

    def dequantize(self) -> Float[Tensor, "rows columns"]:
        return self.values.float()

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.values.shape
        return rows, columns

    @property
    def entry_bits(self) -> int:
        """Stored bits of each weight's own number."""
        return 8 * self.values.element_size()

    def size(self) -> int:
        return self.entry_bits * self.values.numel()

    def rows(self, start: int, stop: int) -> "Plain":
        return Plain(self.values[start:stop])

    def stored(self) -> dict[str, Tensor]:
        return {"values": self.values}

    def stored_where(self, kept: Bool[Tensor, "rows columns"]) -> dict[str, Tensor]:
        """`stored` without the numbers of the other weights."""
        return {"values": self.values[kept]}

    def layout(self) -> dict[str, Any]:
        return {}

    @staticmethod
    def restore(stored: dict[str, Tensor], layout: dict[str, Any]) -> "Plain":
        return Plain(stored["values"])

    @staticmethod
    def restore_where(
        kept: Bool[Tensor, "rows columns"], stored: dict[str, Tensor], layout: dict[str, Any]
    ) -> "Plain":
        """The inverse of `stored_where`; the other weights are 0."""
        values = torch.zeros(kept.shape, dtype=stored["values"].dtype)
        values[kept] = stored["values"]
        return Plain(values)
