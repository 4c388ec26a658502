"""Interface of the stored forms of quantized matrices."""

from abc import ABC, abstractmethod
from typing import Any

from jaxtyping import Float
from torch import Tensor


class Packed(ABC):
    """The stored form of one matrix."""

    @abstractmethod
    def dequantize(self) -> Float[Tensor, "rows columns"]:
        """The matrix in float32, bit for bit equal to the solver's result."""

    @abstractmethod
    def stored(self) -> dict[str, Tensor]:
        """The tensors as written to a file, with bit-packed codes."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""

    @abstractmethod
    def size(self) -> int:
        """Bits of all tensors of `stored`, without the padding of last bytes."""

    def bits(self) -> float:
        """Stored bits per weight."""
        rows, columns = self.shape
        return self.size() / (rows * columns)

    @abstractmethod
    def rows(self, start: int, stop: int) -> "Packed":
        """The stored form of rows `start` to `stop`. ValueError where rows cannot be separated."""

    def whole(self) -> "Packed":
        """The form itself, for callers that look into it: see `Shelved`."""
        return self

    @abstractmethod
    def layout(self) -> dict[str, Any]:
        """What `restore` needs in addition to the tensors, as JSON values."""

    def described(self) -> dict[str, Any]:
        """`layout` with the name of the form, from which `restored` finds the class."""
        return {"form": type(self).__name__, **self.layout()}

    @staticmethod
    @abstractmethod
    def restore(stored: dict[str, Tensor], layout: dict[str, Any]) -> "Packed":
        """The inverse of `stored` and `layout`."""


def restored(stored: dict[str, Tensor], described: dict[str, Any]) -> Packed:
    """The stored form of any class, from `stored` and `described`. A form holds others by it."""
    forms = {form.__name__: form for form in Packed.__subclasses__()}
    return forms[described["form"]].restore(stored, described)


def nested(name: str, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a form that is part of another one, under its name."""
    return {f"{name}.{key}": tensor for key, tensor in stored.items()}


def part_of(name: str, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `nested`."""
    prefix = f"{name}."
    return {
        key.removeprefix(prefix): tensor for key, tensor in stored.items() if key.startswith(prefix)
    }
