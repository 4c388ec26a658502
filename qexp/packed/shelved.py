"""Stored forms that are kept bit-packed, in memory or on disk, until they are read."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from qexp.common import on_disk
from qexp.packed.base import Packed, restored


@dataclass(frozen=True)
class Shelved(Packed):
    """Another form, of which only the tensors of `stored` are kept: codes take their own bits."""

    tensors: dict[str, Tensor]
    form: dict[str, Any]  # `described` of that form
    dimensions: tuple[int, int]
    total: int  # its size in bits

    @staticmethod
    def of(packed: Packed, disk: bool) -> "Shelved":
        """disk: tensors are kept in mapped files."""
        tensors = {name: tensor.contiguous().cpu() for name, tensor in packed.stored().items()}
        if disk:
            tensors = {name: on_disk.copied(tensor) for name, tensor in tensors.items()}
        return Shelved(tensors, packed.described(), packed.shape, packed.size())

    def whole(self) -> Packed:
        return restored(self.tensors, self.form)

    def dequantize(self) -> Float[Tensor, "rows columns"]:
        return self.whole().dequantize()

    def stored(self) -> dict[str, Tensor]:
        return self.tensors

    @property
    def shape(self) -> tuple[int, int]:
        return self.dimensions

    def size(self) -> int:
        return self.total

    def rows(self, start: int, stop: int) -> Packed:
        return self.whole().rows(start, stop)

    def layout(self) -> dict[str, Any]:
        return {key: value for key, value in self.form.items() if key != "form"}

    def described(self) -> dict[str, Any]:
        return self.form

    @staticmethod
    def restore(stored: dict[str, Tensor], layout: dict[str, Any]) -> Packed:
        return restored(stored, layout)
