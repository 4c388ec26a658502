"""OWQ (Lee et al., 2306.02272): the most sensitive columns in 16 bits, the others on a grid."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qexp.common.errors import UserError, check_choice, check_int, check_number, check_range
from qexp.grid import Grid
from qexp.grid.scale import DTYPES
from qexp.packed.base import Packed
from qexp.packed.parts import Parts
from qexp.solvers.apart import Cast, in_turn
from qexp.solvers.base import Solution, Solver
from qexp.solvers.factor import inverse_factor
from qexp.solvers.rtn import OnGrid


@dataclass(frozen=True)
class OWQ(Solver):
    """The columns with the largest H_jj ‖w_j - Q(w_j)‖² (the weak ones) keep floating-point values
    and come last, so that they make up for the errors of all others.

    base: solver of the other columns, on a grid that is fitted without the weak ones. Its own
    damping adds to `damp`, and its groups are counted without the weak columns, as in the
    reference, so that the last one may be shorter.
    extra: bits per weight that weak columns and their indices add to those of the grid, in every
    matrix: 0.1 on 3 bits is the paper's target of 3.1.
    columns: number of weak columns of every matrix instead; null: as many as `extra` pays for.
    damp: share of the mean diagonal added to the diagonal.
    weak_dtype: of the weak columns.

    Q of the sensitivity is round-to-nearest with one scale per row.
    """

    base: OnGrid
    extra: float | int = 0.1
    columns: int | None = None
    damp: float = 0.01
    weak_dtype: str = "float16"

    def __post_init__(self) -> None:
        check_number("method.solver", self, damp=0)
        check_choice("method.solver", self, weak_dtype=DTYPES)
        right = "bits from 0 to below 1"
        check_range("method.solver", self, right, lambda x: 0 <= x < 1, "extra")
        if self.columns is not None:
            check_int("method.solver", self, columns=0)
        if self.base.needs_moments:
            raise UserError(
                "method.solver.base.carry: the moments of inputs are not divided among columns; "
                "give 0, and method/target=asymmetric for inputs that have moved."
            )

    @property
    def grid(self) -> Grid:
        return self.base.grid

    def check(self, rows: int, columns: int) -> None:
        self.base.check(rows, columns)
        if self.weak(rows, columns) > columns:
            raise UserError(
                f"method.solver.columns={self.columns}: a layer has {columns} inputs; give at most "
                f"{columns}."
            )

    @property
    def rowwise(self) -> bool:
        return False  # weak columns are chosen by all rows

    @property
    def baseline(self) -> Solver:
        return self.base.baseline

    def weak(self, rows: int, columns: int) -> int:
        """Number of weak columns of a [rows, columns] matrix."""
        if self.columns is not None:
            return self.columns
        each = (self._wide - self.grid.bits) * rows + 16  # values instead of codes, and an index
        return round(self.extra * rows * columns / each)

    @property
    def _wide(self) -> int:
        return torch.finfo(getattr(torch, self.weak_dtype)).bits

    def sensitivity(
        self, weight: Float[Tensor, "rows columns"], hessian: Float[Tensor, "columns columns"]
    ) -> Float[Tensor, " columns"]:
        """H_jj Σ_i (w_ij - Q(w_ij))² of every column."""
        by_row: Grid = replace(self.grid, group_size=None)  # type: ignore[type-var]
        return hessian.diagonal() * (by_row(weight) - weight).square().sum(0)

    def __call__(
        self,
        weight: Float[Tensor, "rows columns"],
        hessian: Float[Tensor, "columns columns"],
    ) -> Solution:
        rows, columns = weight.shape
        count = self.weak(rows, columns)
        ranked = self.sensitivity(weight.float(), hessian).argsort(descending=True, stable=True)
        weak, others = ranked[:count].sort().values, ranked[count:].sort().values
        order = torch.cat([others, weak])
        factor = inverse_factor(hessian, self.damp, order=order)
        weight = weight.float()[:, order].masked_fill(factor.dead, 0)
        parts = self._strong(len(others)) + [(count, Cast(self.weak_dtype))] * (count > 0)
        forms = [each.packed for each in in_turn(weight, factor.upper, parts)]
        packed = _joined(forms, weak if 0 < count < columns else None)
        paper = self.grid.bits + (self._wide - self.grid.bits) * count / columns
        return Solution(packed.dequantize(), packed.bits(), packed, factor.damp, paper)

    def _strong(self, columns: int) -> list[tuple[int, Solver]]:
        """The solvers of this many columns: of whole groups, and of a shorter last one."""
        last = columns % (self.grid.group_size or max(columns, 1))
        one: Grid = replace(self.grid, group_size=None)  # type: ignore[type-var]
        short: OnGrid = replace(self.base, grid=one)  # type: ignore[type-var]
        return [(n, each) for n, each in ((columns - last, self.base), (last, short)) if n]


def _joined(forms: list[Packed], listed: Int[Tensor, " listed"] | None) -> Packed:
    return forms[0] if len(forms) == 1 else Parts(tuple(forms), listed)
