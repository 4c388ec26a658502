"""Stored form of matrices whose groups of rows were solved one by one."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.packed.base import Packed, nested, part_of, restored


@dataclass(frozen=True)
class Stacked(Packed):
    """The stored forms of adjacent groups of rows, one below the other."""

    parts: tuple[Packed, ...]

    def dequantize(self) -> Float[Tensor, "rows columns"]:
        return torch.cat([part.dequantize() for part in self.parts])

    @property
    def shape(self) -> tuple[int, int]:
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    def size(self) -> int:
        return sum(part.size() for part in self.parts)

    def rows(self, start: int, stop: int) -> "Stacked":
        kept, first = [], 0
        for part in self.parts:
            last = first + part.shape[0]
            if start < last and stop > first:
                kept.append(part.rows(max(start, first) - first, min(stop, last) - first))
            first = last
        return Stacked(tuple(kept))

    def stored(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for number, part in enumerate(self.parts):
            tensors |= nested(str(number), part.stored())
        return tensors

    def layout(self) -> dict[str, Any]:
        return {"parts": [part.described() for part in self.parts]}

    @staticmethod
    def restore(stored: dict[str, Tensor], layout: dict[str, Any]) -> "Stacked":
        parts = enumerate(layout["parts"])
        return Stacked(tuple(restored(part_of(str(at), stored), each) for at, each in parts))
