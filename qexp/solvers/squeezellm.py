"""SqueezeLLM (Kim et al., 2306.07629): weighted k-means per row, and sparse outliers."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qexp.common.errors import UserError, check_bool, check_choice, check_int, check_range
from qexp.grid import IntGrid
from qexp.grid.kmeans import kmeans
from qexp.grid.scale import DTYPES
from qexp.packed.outliers import Outliers
from qexp.packed.table import Table
from qexp.solvers.base import Solution, Solver
from qexp.solvers.codebook import nearest_codes
from qexp.solvers.rtn import RTN


class OnTable(Solver):
    """Solvers whose values are 2^bits entries of a table in each row.

    scale_dtype: of the entries, which rounding uses: float16, bfloat16 or float32.
    """

    bits: int
    scale_dtype: str

    def check(self, rows: int, columns: int) -> None:
        """Any shape has a table."""

    @property
    def baseline(self) -> Solver:
        return RTN(IntGrid(self.bits, scale_dtype=self.scale_dtype))

    def check_settings(self) -> None:
        """UserError for bits or a dtype that no table has."""
        whole = "a whole number from 2 to 8"
        check_range("method.solver", self, whole, lambda x: x in range(2, 9), "bits")
        check_choice("method.solver", self, scale_dtype=DTYPES)


@dataclass(frozen=True)
class SqueezeLLM(OnTable):
    """Per row the 2^bits values with the least Σ_j F_ij Δ_ij², F the diagonal of the row's Hessian.

    steps: most steps of Lloyd's algorithm.
    per_tensor: one table for the whole matrix.
    sensitive: share of the matrix' weights, those with the largest F, that stay in floating point.
    outliers: share of all weights that do, these included; the others are the largest in magnitude
    (the paper's dense-and-sparse: 0.0005 and 0.0045). Tables are fitted without them. The
    reference has a threshold in quartiles in place of the share of the largest.
    """

    bits: int = 3
    steps: int = 50
    per_tensor: bool = False
    sensitive: float | int = 0.0
    outliers: float | int = 0.0
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        self.check_settings()
        check_int("method.solver", self, steps=1)
        check_bool("method.solver", self, "per_tensor")
        share = "a share from 0 to below 1"
        check_range("method.solver", self, share, lambda x: 0 <= x < 1, "sensitive", "outliers")
        if self.sensitive > self.outliers:
            raise UserError(
                f"method.solver.sensitive={self.sensitive}: give at most "
                f"method.solver.outliers={self.outliers}, which includes it."
            )

    @property
    def needs_diagonal(self) -> bool:
        return True

    @property
    def rowwise(self) -> bool:
        return not (self.per_tensor or self.outliers)

    def measure(
        self,
        change: Float[Tensor, "rows columns"],
        hessian: Float[Tensor, "each columns"] | None,
    ) -> float:
        """Σ F Δ²."""
        weighted = change.float() if hessian is None else change.float() * hessian
        return float(torch.sum(weighted * change, dtype=torch.float64))

    def __call__(
        self,
        weight: Float[Tensor, "rows columns"],
        hessian: Float[Tensor, "each columns"],
    ) -> Solution:
        weight, shape = weight.float(), weight.shape
        dtype = getattr(torch, self.scale_dtype)
        sensitivity = hessian.float().expand(shape)
        sparse = outlying(weight, sensitivity, self.sensitive, self.outliers)
        counted = sensitivity.masked_fill(sparse, 0)
        values = weight.masked_fill(sparse, 0)
        if self.per_tensor:
            values, counted = values.reshape(1, -1), counted.reshape(1, -1)
        table = kmeans(values, counted, 2**self.bits, self.steps).to(dtype)
        codes = nearest_codes(values, table.float()).reshape(shape).int()
        outliers = Outliers.of(weight, sparse, self.scale_dtype) if self.outliers else None
        packed = Table(self.bits, codes, table, outliers)
        paper = None
        if outliers is not None:  # which has 32 bits for a column number, and no row ends
            size = self.bits * weight.numel() + table.numel() * 16 + 48 * len(outliers.values)
            paper = size / weight.numel()
        return Solution(packed.dequantize(), packed.bits(), packed, paper_bits=paper)


def outlying(
    weight: Float[Tensor, "rows columns"],
    sensitivity: Float[Tensor, "rows columns"],
    sensitive: float | int,
    outliers: float | int,
) -> Bool[Tensor, "rows columns"]:
    """The weights with the largest sensitivity, and then the largest, up to these shares of all."""
    mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    first, total = (int(share * weight.numel()) for share in (sensitive, outliers))
    mask[sensitivity.flatten().topk(first).indices] = True
    mask[weight.abs().flatten().masked_fill(mask, -1).topk(total - first).indices] = True
    return mask.reshape(weight.shape)
