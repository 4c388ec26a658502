"""Stored form of matrices on a grid: codes, scales and zero points."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qexp.grid import BlockGrid, Grid, IntGrid, LevelGrid, Scale, StepGrid
from qexp.grid.scale import positive
from qexp.packed.base import Packed, nested, part_of
from qexp.packed.bitpacking import pack_bits, pack_trits, unpack_bits, unpack_trits
from qexp.packed.outliers import Outliers

GRIDS: dict[str, type[IntGrid | LevelGrid | StepGrid | BlockGrid]] = {
    grid.__name__: grid for grid in (IntGrid, LevelGrid, StepGrid, BlockGrid)
}


@dataclass(frozen=True)
class Coded(Packed):
    """Codes of a grid with their scales.

    codes: in the column order of the matrix. scale, zero: [rows, groups], or [1, 1] for a
    per-tensor grid; `Coded` where a second-level grid quantizes them, transposed to [groups, rows]
    where that one runs along the outputs. group: the group of each column, where groups are not
    adjacent columns (act_order without static groups).
    """

    grid: Grid
    codes: Int[Tensor, "rows columns"]
    scale: "Float[Tensor, 'each groups'] | Coded"
    zero: "Float[Tensor, 'each groups'] | Coded | None" = None
    group: Int[Tensor, " columns"] | None = None
    outliers: Outliers | None = None

    @staticmethod
    def of(
        grid: Grid,
        weight: Float[Tensor, "rows columns"],
        scales: Scale,
        group: Int[Tensor, " columns"] | None = None,
        outliers: Outliers | None = None,
    ) -> "Coded":
        """Encode a matrix whose values are those of the grid with `scales` [rows, groups], or the
        values nearest to others."""
        codes = grid.encode(weight.float(), _per_column(scales, group, weight.shape[1]))
        return Coded.coded(grid, codes, scales, group, outliers)

    @staticmethod
    def coded(
        grid: Grid,
        codes: Float[Tensor, "rows columns"],
        scales: Scale,
        group: Int[Tensor, " columns"] | None = None,
        outliers: Outliers | None = None,
    ) -> "Coded":
        """Codes of the grid with `scales` [rows, groups]."""
        stored = slice(1 if grid.per_tensor else None)
        scale: Tensor | Coded = scales.scale[stored, stored]
        zero: Tensor | Coded | None = scales.zero[stored, stored] if grid.has_zero else None
        if grid.second_level:
            assert scales.raw is not None, "scales of a two-level grid need their raw values"
            raw = dict(zip(("scales", "zeros"), scales.raw, strict=True))
            own = {"scales": scales.scale, "zeros": scales.zero}
            coded = {
                name: _on_grid(part, own[name], raw[name])
                for name, part in grid.second_level.items()
            }
            scale, zero = coded.get("scales", scale), coded.get("zeros", zero)
        return Coded(grid, codes.to(torch.int32), scale, zero, group, outliers)

    def scales(self) -> Scale:
        """Scales and zero points [rows, groups] as decoding uses them."""
        scale = _plain(self.scale)
        if isinstance(self.scale, Coded):
            scale = positive(scale)
        if self.zero is not None:
            return Scale(scale, _plain(self.zero))
        return Scale(scale, torch.full_like(scale, self.grid.unstored_zero))

    def per_column(self) -> Scale:
        """Scale and zero point of every weight, [rows, columns]."""
        wide = _per_column(self.scales(), self.group, self.codes.shape[1])
        return wide.map(lambda part: part.expand(self.codes.shape))

    def dequantize(self) -> Float[Tensor, "rows columns"]:
        weight = self.grid.decode(self.codes.float(), self.per_column())
        return weight if self.outliers is None else self.outliers.put(weight)

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.codes.shape
        return rows, columns

    def size(self) -> int:
        total = math.ceil(self.codes.numel() * self.grid.code_bits)
        dtype = torch.finfo(getattr(torch, self.grid.scale_dtype)).bits
        for part, bits in ((self.scale, dtype), (self.zero, self.grid.zero_bits)):
            if isinstance(part, Coded):
                total += part.size()
            elif part is not None:
                total += part.numel() * bits
        total += 0 if self.group is None else 16 * len(self.group)
        return total + (0 if self.outliers is None else self.outliers.size())

    def rows(self, start: int, stop: int) -> "Coded":
        scale = self.scale
        if isinstance(scale, Coded) and scale.grid.axis == "inputs":
            scale = scale.rows(start, stop)
        elif isinstance(scale, Tensor):
            scale = scale[start:stop]
        if scale is self.scale or isinstance(self.zero, Coded):
            raise ValueError("rows that share second-level scales cannot be separated")
        return replace(
            self,
            codes=self.codes[start:stop],
            scale=scale,
            zero=None if self.zero is None else self.zero[start:stop],
            outliers=None if self.outliers is None else self.outliers.rows(start, stop),
        )

    def stored(self) -> dict[str, Tensor]:
        dtype = getattr(torch, self.grid.scale_dtype)
        tensors = {"codes": _pack(self.codes, self.grid)}
        for name, part in (("scale", self.scale), ("zero", self.zero)):
            if isinstance(part, Coded):
                tensors |= nested(name, part.stored())
            elif part is not None and name == "zero" and self.grid.zero_bits == self.grid.bits:
                tensors[name] = pack_bits(part.to(torch.int32), self.grid.bits)
            elif part is not None:
                tensors[name] = part.to(dtype)
        if self.group is not None:
            tensors["group"] = self.group.to(torch.int16)
        return tensors | ({} if self.outliers is None else self.outliers.stored())

    @property
    def entry_bits(self) -> float:
        """Stored bits of each weight's own code."""
        return self.grid.code_bits

    def paper_bits(self) -> float | None:
        """Bits per weight as papers count them, where that number differs from `bits`."""
        return self.bits() - self.grid.code_bits + math.log2(3) if self.grid.top == 2 else None

    def stored_where(self, kept: Bool[Tensor, "rows columns"]) -> dict[str, Tensor]:
        """`stored` without the codes of the other weights."""
        return self.stored() | {"codes": _pack(self.codes[kept], self.grid)}

    @staticmethod
    def restore_where(
        kept: Bool[Tensor, "rows columns"], stored: dict[str, Tensor], layout: dict[str, Any]
    ) -> "Coded":
        """The inverse of `stored_where`; the other weights have the code 0."""
        grid = GRIDS[layout["kind"]](**layout["grid"])
        codes = torch.zeros(kept.shape, dtype=torch.int32)
        codes[kept] = _unpack(stored["codes"], grid, (int(kept.sum()),)).int()
        return Coded.restore(stored | {"codes": _pack(codes, grid)}, layout)

    def layout(self) -> dict[str, Any]:
        grid = {
            each.name: getattr(self.grid, each.name)
            for each in fields(self.grid)  # type: ignore[arg-type]
            # Decoding needs neither the range estimator nor the second-level grids.
            if each.name not in ("range", "scales", "zeros")
        }
        layout: dict[str, Any] = {
            "kind": type(self.grid).__name__,
            "grid": grid,
            "shape": list(self.codes.shape),
        }
        for name, part in (("scale", self.scale), ("zero", self.zero)):
            if isinstance(part, Coded):
                layout[name] = part.layout()
            elif part is not None:
                layout[name] = list(part.shape)
        return layout

    @staticmethod
    def restore(stored: dict[str, Tensor], layout: dict[str, Any]) -> "Coded":
        grid = GRIDS[layout["kind"]](**layout["grid"])
        shape = tuple(layout["shape"])
        parts: dict[str, Tensor | Coded | None] = {"scale": None, "zero": None}
        for name in parts:
            if isinstance(layout.get(name), dict):
                parts[name] = Coded.restore(part_of(name, stored), layout[name])
            elif name in layout and stored[name].dtype == torch.uint8:
                parts[name] = unpack_bits(stored[name], grid.bits, tuple(layout[name])).float()
            elif name in layout:
                parts[name] = stored[name].float()
        assert parts["scale"] is not None
        return Coded(
            grid,
            _unpack(stored["codes"], grid, shape).int(),
            parts["scale"],
            parts["zero"],
            stored["group"].long() if "group" in stored else None,
            Outliers.restore(stored) if "outlier_ends" in stored else None,
        )


def _pack(codes: Int[Tensor, "..."], grid: Grid) -> Tensor:
    return pack_trits(codes) if grid.top == 2 else pack_bits(codes, grid.bits)


def _unpack(stored: Tensor, grid: Grid, shape: tuple[int, ...]) -> Int[Tensor, "..."]:
    if grid.top == 2:
        return unpack_trits(stored, shape)
    return unpack_bits(stored, grid.bits, shape)


def _plain(part: "Tensor | Coded") -> Float[Tensor, "each groups"]:
    if not isinstance(part, Coded):
        return part.float()
    return part.dequantize() if part.grid.axis == "inputs" else part.dequantize().T


def _on_grid(
    grid: Grid, values: Float[Tensor, "rows groups"], raw: Float[Tensor, "rows groups"]
) -> Coded:
    """Scales or zero points `values` in storage; `raw` as in `Scale`."""
    if grid.axis == "inputs":
        own = raw[:, :1].contiguous()
        return Coded.of(grid, values, Scale(own, torch.full_like(own, 2 ** (grid.bits - 1))))
    transposed = raw.T.contiguous()
    return Coded.of(grid, transposed, grid.scales_of(transposed))


def _per_column(scales: Scale, group: Int[Tensor, " columns"] | None, columns: int) -> Scale:
    """Scale and zero point of every weight, [rows, columns] (or [rows, 1] for a single group)."""
    if group is not None:
        return Scale(scales.scale[:, group], scales.zero[:, group])
    groups = scales.scale.shape[1]
    if groups == 1:
        return Scale(scales.scale, scales.zero)
    repeat = columns // groups
    return Scale(
        scales.scale.repeat_interleave(repeat, 1), scales.zero.repeat_interleave(repeat, 1)
    )
