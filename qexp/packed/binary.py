"""Stored form of binarized matrices: a sign per weight, and levels per row and block."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qexp.packed.base import Packed
from qexp.packed.bitpacking import pack_bits, unpack_bits


@dataclass(frozen=True)
class Halves:
    """The bits of a matrix, which select one of its row's values for each weight.

    signs: above or below the mean of the weight's group. high: whether a weight outside the
    salient columns is in the group of large ones. salient: columns with a second sign per weight,
    `residual`.
    """

    signs: Bool[Tensor, "rows columns"]
    high: Bool[Tensor, "rows columns"] | None = None
    salient: Bool[Tensor, " columns"] | None = None
    residual: Bool[Tensor, "rows columns"] | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> "Halves":
        """The same change, such as a slice, applied to all tensors."""
        parts = (self.signs, self.high, self.salient, self.residual)
        return Halves(*(None if part is None else change(part) for part in parts))  # type: ignore[arg-type]

    def at(self, columns: slice) -> "Halves":
        """A slice of the columns."""
        return self.map(lambda part: part[..., columns])

    @staticmethod
    def join(blocks: "list[Halves]") -> "Halves":
        """Blocks of columns, concatenated."""

        def concatenated(name: str) -> Tensor | None:
            parts = [getattr(block, name) for block in blocks]
            return None if parts[0] is None else torch.cat(parts, -1)

        signs = concatenated("signs")
        assert signs is not None
        high, salient = concatenated("high"), concatenated("salient")
        return Halves(signs, high, salient, concatenated("residual"))

    def decode(self, levels: Float[Tensor, "rows numbers"]) -> Float[Tensor, "rows columns"]:
        """The values of one block: mean ± alpha, in salient columns mean ± alpha ± second alpha.

        levels: mean and alpha of the low group; then, with `high`, those of the high group; then,
        with `salient`, mean, alpha and second alpha of the salient columns.
        """
        sign = self.signs.float().mul_(2).sub_(1)
        mean, alpha, *rest = levels.float()[:, :, None].unbind(1)
        if self.high is not None:
            mean = torch.where(self.high, rest[0], mean)
            alpha = torch.where(self.high, rest[1], alpha)
        weight = mean + alpha * sign
        if self.salient is None or self.residual is None:
            return weight
        mean, alpha, second_alpha = rest[-3:]
        second_sign = self.residual.float().mul_(2).sub_(1)
        salient = mean + alpha * sign + second_alpha * second_sign
        return torch.where(self.salient, salient, weight)


@dataclass(frozen=True)
class Binary(Packed):
    """Blocks of `block` columns, each with `levels` per row, in their stored dtype.

    A weight takes one bit for its sign and one more: outside the salient columns for its group,
    inside for its second sign.
    """

    block: int
    halves: Halves
    levels: Float[Tensor, "rows blocks numbers"]

    def dequantize(self) -> Float[Tensor, "rows columns"]:
        decoded = []
        for index in range(self.levels.shape[1]):
            columns = slice(index * self.block, (index + 1) * self.block)
            decoded.append(self.halves.at(columns).decode(self.levels[:, index]))
        return torch.cat(decoded, 1)

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.halves.signs.shape
        return rows, columns

    def size(self) -> int:
        (rows, columns), halves = self.shape, self.halves
        bits = rows * columns + self.levels.numel() * 8 * self.levels.element_size()
        salient = 0
        if halves.salient is not None:
            salient = int(halves.salient.sum())
            bits += columns + rows * salient
        return bits if halves.high is None else bits + rows * (columns - salient)

    def rows(self, start: int, stop: int) -> "Binary":
        halves = self.halves.map(lambda t: t if t.ndim == 1 else t[start:stop])
        return Binary(self.block, halves, self.levels[start:stop])

    def stored(self) -> dict[str, Tensor]:
        halves, everywhere = self.halves, slice(None)
        masks = {"signs": halves.signs, "salient": halves.salient}
        inside = everywhere if halves.salient is None else halves.salient
        outside = everywhere if halves.salient is None else ~halves.salient
        if halves.high is not None:
            masks["high"] = halves.high[:, outside]
        if halves.residual is not None:
            masks["residual"] = halves.residual[:, inside]
        packed = {name: pack_bits(t.int(), 1) for name, t in masks.items() if t is not None}
        return packed | {"levels": self.levels}

    def layout(self) -> dict[str, Any]:
        return {"block": self.block, "shape": list(self.shape)}

    @staticmethod
    def restore(stored: dict[str, Tensor], layout: dict[str, Any]) -> "Binary":
        rows, columns = layout["shape"]
        salient = None
        if "salient" in stored:
            salient = unpack_bits(stored["salient"], 1, (columns,)).bool()
        everywhere = torch.ones(columns, dtype=torch.bool)
        inside = everywhere if salient is None else salient

        def scattered(name: str, where: Tensor) -> Tensor | None:
            if name not in stored:
                return None
            whole = torch.zeros(rows, columns, dtype=torch.bool)
            count = int(where.sum())
            whole[:, where] = unpack_bits(stored[name], 1, (rows, count)).bool()
            return whole

        signs = unpack_bits(stored["signs"], 1, (rows, columns)).bool()
        high = scattered("high", everywhere if salient is None else ~salient)
        halves = Halves(signs, high, salient, scattered("residual", inside))
        return Binary(layout["block"], halves, stored["levels"])
