"""Sparse storage of outliers: single weights in floating point."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Outliers:
    """Weights stored in floating point, in CSR form: row ends, column indices and values."""

    ends: Int[Tensor, " rows"]
    columns: Int[Tensor, " count"]
    values: Float[Tensor, " count"]

    @staticmethod
    def of(
        weight: Float[Tensor, "rows columns"], mask: Bool[Tensor, "rows columns"], dtype: str
    ) -> "Outliers":
        """The masked entries of a matrix, with their values in `dtype`."""
        values = weight[mask].to(getattr(torch, dtype))
        return Outliers(mask.sum(1).cumsum(0), mask.nonzero()[:, 1], values)

    def size(self) -> int:
        return 32 * len(self.ends) + (16 + 8 * self.values.element_size()) * len(self.values)

    def put(self, weight: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        """The matrix with its outlier entries replaced by the stored values."""
        counts = self.ends.diff(prepend=self.ends.new_zeros(1))
        rows = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
        return weight.index_put((rows, self.columns), self.values.to(weight.dtype))

    def rows(self, start: int, stop: int) -> "Outliers":
        first = int(self.ends[start - 1]) if start else 0
        last = int(self.ends[stop - 1])
        ends = self.ends[start:stop] - first
        return Outliers(ends, self.columns[first:last], self.values[first:last])

    def stored(self) -> dict[str, Tensor]:
        return {
            "outlier_ends": self.ends.to(torch.int32),
            # uint16 holds 65,536 columns; no linear layer in use is wider.
            "outlier_columns": self.columns.to(torch.uint16),
            "outlier_values": self.values,
        }

    @staticmethod
    def restore(stored: dict[str, Tensor]) -> "Outliers":
        ends, columns = stored["outlier_ends"].long(), stored["outlier_columns"].long()
        return Outliers(ends, columns, stored["outlier_values"])
