"""Interface of the stored form of a quantized matrix."""

from abc import ABC, abstractmethod
from typing import Any

from jaxtyping import Float
from torch import Tensor


class Packed(ABC):
    """The stored form of one matrix."""

    @abstractmethod
    def dequantize(self) -> Float[Tensor, "rows columns"]:
        """The matrix, in float32, bit for bit the one the solver returned."""

    @abstractmethod
    def stored(self) -> dict[str, Tensor]:
        """The tensors as they lie in a file, codes packed to bits."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""

    @abstractmethod
    def size(self) -> int:
        """Bits that `stored` takes, everything included (not the filling of last bytes)."""

    def bits(self) -> float:
        """Stored bits per weight."""
        rows, columns = self.shape
        return self.size() / (rows * columns)

    @abstractmethod
    def rows(self, start: int, stop: int) -> "Packed":
        """The stored form of some rows alone."""

    @abstractmethod
    def layout(self) -> dict[str, Any]:
        """What `restore` must know beside the tensors, fit for JSON."""

    @staticmethod
    @abstractmethod
    def restore(stored: dict[str, Tensor], layout: dict[str, Any]) -> "Packed":
        """The inverse of `stored` and `layout`."""
