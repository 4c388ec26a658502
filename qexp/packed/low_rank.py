"""Stored form of matrices that are the sum of another stored form and a product of two factors."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from qexp.packed.base import Packed, nested, part_of, restored
from qexp.packed.coded import Coded

# [rank, rows] and [rank, columns]: groups of a coded factor run along the long side.
Factor = Float[Tensor, "rank _"] | Coded


@dataclass(frozen=True)
class LowRank(Packed):
    """base + outputsᵀ · inputs, with factors in their stored dtype or on a grid."""

    base: Packed
    outputs: Float[Tensor, "rank rows"] | Coded
    inputs: Float[Tensor, "rank columns"] | Coded

    def dequantize(self) -> Float[Tensor, "rows columns"]:
        base = self.base.dequantize()  # on the host, where an earlier step stored it
        outputs, inputs = (_plain(each).to(base.device) for each in (self.outputs, self.inputs))
        return plus_product(base, outputs, inputs)

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    def size(self) -> int:
        return self.base.size() + sum(_size(factor) for factor in (self.outputs, self.inputs))

    def rows(self, start: int, stop: int) -> "LowRank":
        raise ValueError("rows that share their factors cannot be separated")

    def stored(self) -> dict[str, Tensor]:
        tensors = nested("base", self.base.stored())
        for name, factor in (("outputs", self.outputs), ("inputs", self.inputs)):
            if isinstance(factor, Coded):
                tensors |= nested(name, factor.stored())
            else:
                tensors[name] = factor
        return tensors

    def layout(self) -> dict[str, Any]:
        layout: dict[str, Any] = {"base": self.base.described()}
        for name, factor in (("outputs", self.outputs), ("inputs", self.inputs)):
            if isinstance(factor, Coded):
                layout[name] = factor.layout()
        return layout

    @staticmethod
    def restore(stored: dict[str, Tensor], layout: dict[str, Any]) -> "LowRank":
        def factor(name: str) -> Factor:
            if name in layout:
                return Coded.restore(part_of(name, stored), layout[name])
            return stored[name]

        base = restored(part_of("base", stored), layout["base"])
        return LowRank(base, factor("outputs"), factor("inputs"))


def plus_product(
    base: Float[Tensor, "rows columns"],
    outputs: Float[Tensor, "rank rows"],
    inputs: Float[Tensor, "rank columns"],
) -> Float[Tensor, "rows columns"]:
    """base + outputsᵀ · inputs. The product is taken in float64 and the sum cast to float32 once,
    so that storage gives the same float32 on any machine."""
    product = outputs.double().T @ inputs.double()
    return (base.double() + product).float().contiguous()


def _plain(factor: Factor) -> Float[Tensor, "rank length"]:
    return factor.dequantize() if isinstance(factor, Coded) else factor


def _size(factor: Factor) -> int:
    if isinstance(factor, Coded):
        return factor.size()
    return 8 * factor.element_size() * factor.numel()
