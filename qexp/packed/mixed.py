"""Stored form of matrices in which some weights are coded and the others binarized."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qexp.packed.base import Packed
from qexp.packed.binary import Binary, Halves
from qexp.packed.bitpacking import pack_bits, unpack_bits
from qexp.packed.coded import Coded


@dataclass(frozen=True)
class Partial(Packed):
    """One bit per weight marks the salient ones: they have a code in `coded`, the others a sign in
    `signs`. In memory both hold the whole matrix, in storage only their own weights."""

    salient: Bool[Tensor, "rows columns"]
    coded: Coded
    signs: Binary

    def dequantize(self) -> Float[Tensor, "rows columns"]:
        return torch.where(self.salient, self.coded.dequantize(), self.signs.dequantize())

    @property
    def shape(self) -> tuple[int, int]:
        return self.signs.shape

    def size(self) -> int:
        every, salient = self.salient.numel(), int(self.salient.sum())
        bits = self.coded.grid.bits
        scales = self.coded.size() - bits * every
        levels = self.signs.size() - every
        return every + bits * salient + (every - salient) + scales + levels

    def rows(self, start: int, stop: int) -> "Partial":
        salient = self.salient[start:stop]
        return Partial(salient, self.coded.rows(start, stop), self.signs.rows(start, stop))

    def stored(self) -> dict[str, Tensor]:
        return self.coded.stored_where(self.salient) | {
            "salient": pack_bits(self.salient.int(), 1),
            "signs": pack_bits(self.signs.halves.signs[~self.salient].int(), 1),
            "levels": self.signs.levels,
        }

    def layout(self) -> dict[str, Any]:
        return {"coded": self.coded.layout(), "block": self.signs.block}

    @staticmethod
    def restore(stored: dict[str, Tensor], layout: dict[str, Any]) -> "Partial":
        rows, columns = layout["coded"]["shape"]
        salient = unpack_bits(stored["salient"], 1, (rows, columns)).bool()
        coded = Coded.restore_where(salient, stored, layout["coded"])
        count = int(salient.sum())
        signs = torch.zeros(rows, columns, dtype=torch.bool)
        signs[~salient] = unpack_bits(stored["signs"], 1, (rows * columns - count,)).bool()
        return Partial(salient, coded, Binary(layout["block"], Halves(signs), stored["levels"]))
