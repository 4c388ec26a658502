"""Stored form of matrices that were rounded after random rotations of rows and columns."""

from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.packed.base import Packed
from qexp.packed.coded import Coded


@dataclass(frozen=True)
class Rotation:
    """x → (A ⊗ B) P x: a random permutation, then the Kronecker product of two small random
    orthogonal matrices (QuIP, 2307.13304, section 4).

    It is generated from a seed and not stored. In float64, so that the inverse rounds to the same
    float32 on any machine.
    """

    left: Float[Tensor, "p p"]
    right: Float[Tensor, "q q"]
    order: Tensor

    @staticmethod
    def random(length: int, generator: torch.Generator) -> "Rotation":
        small = next(p for p in range(isqrt(length), 0, -1) if length % p == 0)
        order = torch.randperm(length, generator=generator)
        return Rotation(
            _orthogonal(small, generator), _orthogonal(length // small, generator), order
        )

    def apply(self, x: Float[Tensor, "rows length"]) -> Float[Tensor, "rows length"]:
        """Every row rotated."""
        order, left, right = (t.to(x.device) for t in (self.order, self.left, self.right))
        parts = x.double()[:, order].reshape(len(x), len(left), len(right))
        return (left @ parts @ right.T).reshape(x.shape)

    def undo(self, x: Float[Tensor, "rows length"]) -> Float[Tensor, "rows length"]:
        """The inverse of `apply`."""
        order, left, right = (t.to(x.device) for t in (self.order, self.left, self.right))
        parts = x.double().reshape(len(x), len(left), len(right))
        return (left.T @ parts @ right).reshape(x.shape)[:, torch.argsort(order)]


def _orthogonal(size: int, generator: torch.Generator) -> Float[Tensor, "size size"]:
    """Uniform over the orthogonal group: the sign of R's diagonal makes QR unique."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def rotations(rows: int, columns: int, seed: int) -> tuple[Rotation, Rotation]:
    """The rotations of the outputs (rows) and of the inputs (columns) of a matrix."""
    generator = torch.Generator().manual_seed(seed)
    return Rotation.random(rows, generator), Rotation.random(columns, generator)


@dataclass(frozen=True)
class Rotated(Packed):
    """Codes of U (W · column_scale) Vᵀ, the seed of U and V, and one column scale per input."""

    inner: Coded
    seed: int
    column_scale: Float[Tensor, " columns"]

    def dequantize(self) -> Float[Tensor, "rows columns"]:
        outputs, inputs = rotations(*self.shape, self.seed)
        scaled = outputs.undo(inputs.undo(self.inner.dequantize()).T).T
        return (scaled / self.column_scale.double()).float().contiguous()

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    def size(self) -> int:
        seed = 64
        return (
            self.inner.size() + 8 * self.column_scale.element_size() * len(self.column_scale) + seed
        )

    def rows(self, start: int, stop: int) -> "Rotated":
        raise ValueError("rows that were rotated together cannot be separated")

    def stored(self) -> dict[str, Tensor]:
        seed = torch.tensor([self.seed])
        return self.inner.stored() | {"stretch": self.column_scale, "seed": seed}

    def layout(self) -> dict[str, Any]:
        return self.inner.layout()

    @staticmethod
    def restore(stored: dict[str, Tensor], layout: dict[str, Any]) -> "Rotated":
        return Rotated(Coded.restore(stored, layout), int(stored["seed"]), stored["stretch"])
