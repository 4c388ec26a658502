"""Stored form of matrices whose groups of rows were solved one by one."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.packed.base import Packed, restored


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
        return {
            f"{number}.{key}": tensor
            for number, part in enumerate(self.parts)
            for key, tensor in part.stored().items()
        }

    def layout(self) -> dict[str, Any]:
        return {"parts": [part.described() for part in self.parts]}

    @staticmethod
    def restore(stored: dict[str, Tensor], layout: dict[str, Any]) -> "Stacked":
        parts = []
        for number, each in enumerate(layout["parts"]):
            prefix = f"{number}."
            own = {k.removeprefix(prefix): t for k, t in stored.items() if k.startswith(prefix)}
            parts.append(restored(own, each))
        return Stacked(tuple(parts))
