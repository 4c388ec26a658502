"""Stored form of matrices whose weights a mask divides among two forms, or a form and zero."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qexp.packed.base import Packed, nested, part_of
from qexp.packed.bitpacking import pack_bits, unpack_bits
from qexp.packed.coded import Coded
from qexp.packed.plain import Plain

FORMS: dict[str, type[Coded] | type[Plain]] = {"Coded": Coded, "Plain": Plain}


@dataclass(frozen=True)
class Masked(Packed):
    """One bit per weight marks those that `inside` holds; the others are exactly 0 or, with
    `outside`, have a value in it. In memory each form holds the whole matrix, in storage only its
    own weights (and all of its scales)."""

    mask: Bool[Tensor, "rows columns"]
    inside: Coded | Plain
    outside: Coded | Plain | None = None

    def dequantize(self) -> Float[Tensor, "rows columns"]:
        inside = self.inside.dequantize()
        outside = torch.zeros_like(inside) if self.outside is None else self.outside.dequantize()
        return torch.where(self.mask, inside, outside)

    @property
    def shape(self) -> tuple[int, int]:
        return self.inside.shape

    @property
    def _held(self) -> dict[str, tuple[Coded | Plain, Bool[Tensor, "rows columns"]]]:
        """The forms by their names in storage, and the weights of each."""
        held = {"inside": (self.inside, self.mask)}
        return held if self.outside is None else held | {"outside": (self.outside, ~self.mask)}

    def size(self) -> int:
        total = self.mask.numel()
        for form, kept in self._held.values():
            total += math.ceil(form.size() - form.entry_bits * int((~kept).sum()))
        return total

    def rows(self, start: int, stop: int) -> "Masked":
        outside = None if self.outside is None else self.outside.rows(start, stop)
        return Masked(self.mask[start:stop], self.inside.rows(start, stop), outside)

    def stored(self) -> dict[str, Tensor]:
        tensors = {"mask": pack_bits(self.mask.int(), 1)}
        for name, (form, kept) in self._held.items():
            tensors |= nested(name, form.stored_where(kept))
        return tensors

    def layout(self) -> dict[str, Any]:
        forms = {
            name: {"form": type(form).__name__, **form.layout()}
            for name, (form, _) in self._held.items()
        }
        return {"shape": list(self.shape), **forms}

    @staticmethod
    def restore(stored: dict[str, Tensor], layout: dict[str, Any]) -> "Masked":
        mask = unpack_bits(stored["mask"], 1, tuple(layout["shape"])).bool()
        forms = [
            FORMS[layout[name]["form"]].restore_where(kept, part_of(name, stored), layout[name])
            for name, kept in (("inside", mask), ("outside", ~mask))
            if name in layout
        ]
        return Masked(mask, *forms)
