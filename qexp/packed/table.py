"""Stored form of matrices on codebooks: codes, and a table of values per row."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from qexp.packed.base import Packed
from qexp.packed.bitpacking import pack_bits, unpack_bits
from qexp.packed.outliers import Outliers


@dataclass(frozen=True)
class Table(Packed):
    """Codes that index the table of their row.

    table: [rows, 2^bits], or [1, 2^bits] where all rows share it, in its stored dtype. outliers:
    weights whose values replace those of their codes.
    """

    bits_per_code: int
    codes: Int[Tensor, "rows columns"]
    table: Float[Tensor, "each levels"]
    outliers: Outliers | None = None

    def dequantize(self) -> Float[Tensor, "rows columns"]:
        table = self.table.float().expand(len(self.codes), -1)
        weight = table.gather(1, self.codes.long())
        return weight if self.outliers is None else self.outliers.put(weight)

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.codes.shape
        return rows, columns

    def size(self) -> int:
        table = self.table.numel() * 8 * self.table.element_size()
        outliers = 0 if self.outliers is None else self.outliers.size()
        return self.codes.numel() * self.bits_per_code + table + outliers

    def rows(self, start: int, stop: int) -> "Table":
        shared = len(self.table) == 1 < len(self.codes)
        return Table(
            self.bits_per_code,
            self.codes[start:stop],
            self.table if shared else self.table[start:stop],
            None if self.outliers is None else self.outliers.rows(start, stop),
        )

    def stored(self) -> dict[str, Tensor]:
        tensors = {"codes": pack_bits(self.codes, self.bits_per_code), "table": self.table}
        return tensors | ({} if self.outliers is None else self.outliers.stored())

    def layout(self) -> dict[str, Any]:
        return {"bits": self.bits_per_code, "shape": list(self.shape)}

    @staticmethod
    def restore(stored: dict[str, Tensor], layout: dict[str, Any]) -> "Table":
        codes = unpack_bits(stored["codes"], layout["bits"], tuple(layout["shape"]))
        outliers = Outliers.restore(stored) if "outlier_ends" in stored else None
        return Table(layout["bits"], codes, stored["table"], outliers)
