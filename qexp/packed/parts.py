"""Stored form of matrices whose columns are divided among several forms."""

from dataclasses import dataclass
from math import ceil, log2
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qexp.packed.base import Packed, nested, part_of, restored
from qexp.packed.bitpacking import pack_bits, unpack_bits


@dataclass(frozen=True)
class Parts(Packed):
    """Disjoint sets of columns, each with a stored form of its own.

    parts: of columns side by side, in the order of the matrix; the last one's columns lie where
    `listed` says and the others fill the places between.
    listed: the columns of the last part, ascending: 16 bits each or, where that is less, a bit per
    column.
    choice: which of `choices` settings each part was given, such as a bit width; as many bits for
    each as that takes.
    """

    parts: tuple[Packed, ...]
    listed: Int[Tensor, " listed"] | None = None
    choice: Int[Tensor, " parts"] | None = None
    choices: int = 1

    def dequantize(self) -> Float[Tensor, "rows columns"]:
        joined = torch.cat([part.dequantize() for part in self.parts], 1)
        if self.listed is None:
            return joined
        place = torch.cat([(~self._marked).nonzero()[:, 0], self.listed])
        return joined[:, torch.argsort(place)]

    @property
    def _marked(self) -> Tensor:
        """Whether each column is a listed one."""
        assert self.listed is not None
        marked = torch.zeros(self.shape[1], dtype=torch.bool, device=self.listed.device)
        marked[self.listed] = True
        return marked

    @property
    def shape(self) -> tuple[int, int]:
        return self.parts[0].shape[0], sum(part.shape[1] for part in self.parts)

    def size(self) -> int:
        total = sum(part.size() for part in self.parts)
        if self.listed is not None:
            total += min(16 * len(self.listed), self.shape[1])
        return total + (0 if self.choice is None else choice_bits(self.choices) * len(self.choice))

    def rows(self, start: int, stop: int) -> "Parts":
        parts = tuple(part.rows(start, stop) for part in self.parts)
        return Parts(parts, self.listed, self.choice, self.choices)

    def stored(self) -> dict[str, Tensor]:
        tensors = {
            key: tensor
            for index, part in enumerate(self.parts)
            for key, tensor in nested(str(index), part.stored()).items()
        }
        if self.listed is not None:
            if 16 * len(self.listed) <= self.shape[1]:
                # uint16 holds 65,536 columns; no linear layer in use is wider.
                tensors["listed"] = self.listed.to(torch.uint16)
            else:
                tensors["marked"] = pack_bits(self._marked.int(), 1)
        if self.choice is not None:
            tensors["choice"] = pack_bits(self.choice, choice_bits(self.choices))
        return tensors

    def layout(self) -> dict[str, Any]:
        parts = [part.described() for part in self.parts]
        return {"parts": parts, "choices": self.choices, "columns": self.shape[1]}

    @staticmethod
    def restore(stored: dict[str, Tensor], layout: dict[str, Any]) -> "Parts":
        parts = tuple(
            restored(part_of(str(index), stored), each)
            for index, each in enumerate(layout["parts"])
        )
        listed, choice, choices = None, None, layout["choices"]
        if "listed" in stored:
            listed = stored["listed"].long()
        elif "marked" in stored:
            marked = unpack_bits(stored["marked"], 1, (layout["columns"],))
            listed = marked.nonzero()[:, 0]
        if "choice" in stored:
            choice = unpack_bits(stored["choice"], choice_bits(choices), (len(parts),)).long()
        return Parts(parts, listed, choice, choices)


def choice_bits(choices: int) -> int:
    """Bits of one of this many settings."""
    return ceil(log2(choices))
