"""The diagonal of the empirical Fisher matrix of each row of a weight (SqueezeLLM, 2306.07629)."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from qexp.common.errors import UserError
from qexp.hessian.from_gradients import FromGradients
from qexp.solvers.base import Solver


@dataclass(frozen=True)
class Diagonal(FromGradients):
    """Σ_n G[n]², one gradient per sequence: a number for each weight, [rows, columns]."""

    def shape(self, rows: int, columns: int) -> tuple[int, ...]:
        return rows, columns

    def add(
        self,
        total: Float[Tensor, "rows columns"],
        x: Float[Tensor, "tokens columns"],
        g: Float[Tensor, "tokens rows"],
    ) -> None:
        total += (g.T @ x).square()

    def finished(
        self, total: Float[Tensor, "rows columns"], columns: int
    ) -> Float[Tensor, "rows columns"]:
        return total

    def per_input(
        self, hessian: Float[Tensor, "rows columns"], columns: int
    ) -> list[Float[Tensor, " columns"]]:
        return [hessian.sum(0)]

    @property
    def is_matrix(self) -> bool:
        return False

    def adapted(self, solver: Solver) -> Solver:
        if not solver.needs_diagonal:
            raise UserError(
                f"method.hessian=diagonal: {type(solver).__name__} needs the products of inputs "
                "too; give method/hessian=layerwise, token or output."
            )
        return solver
