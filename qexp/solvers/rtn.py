"""Round-to-nearest (RTN): every weight is rounded independently."""

from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from qexp.common.errors import UserError
from qexp.grid import Grid
from qexp.packed.coded import Coded
from qexp.solvers.base import Solution, Solver


class OnGrid(Solver):
    """Solvers that round to the values of a grid."""

    grid: Grid

    def check(self, rows: int, columns: int) -> None:
        self.grid.check(rows, columns)

    def least_bits(self, rows: int, columns: int) -> float:
        return self.grid.cost(rows, columns)

    def with_bits(self, bits: int) -> Solver:
        return replace(self, grid=self.grid.with_bits(bits))  # type: ignore[type-var]

    @property
    def rowwise(self) -> bool:
        return self.grid.rowwise

    @property
    def baseline(self) -> Solver:
        return RTN(self.grid)


def check_fits_groups(grid: Grid, advice: str) -> None:
    """UserError where a grid cannot be fitted to one group of columns after another."""
    if grid.fits_whole_rows:
        raise UserError(
            "weight.scales.axis=inputs: the scales of a row have to be fitted together, before its "
            f"columns are rounded; {advice}."
        )


@dataclass(frozen=True)
class RTN(OnGrid):
    """The nearest value of the grid for every weight; ignores the Hessian."""

    grid: Grid

    def __call__(
        self,
        weight: Float[Tensor, "rows columns"],
        hessian: Float[Tensor, "..."] | None = None,
    ) -> Solution:
        weight = weight.float()
        scales = self.grid.scales_of(weight)
        packed = Coded.coded(self.grid, self.grid.codes_of(weight, scales), scales)
        return Solution(packed.dequantize(), packed.bits(), packed, paper_bits=packed.paper_bits())
