"""The diagonal of the empirical Fisher matrix of each row of a weight (SqueezeLLM, 2306.07629)."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from qexp.hessian.output import FromGradients


@dataclass(frozen=True)
class Diagonal(FromGradients):
    """Σ_n G[n]², one gradient per sequence: a number for each weight."""

    @property
    def is_diagonal(self) -> bool:
        return True

    def shape(self, rows: int, columns: int) -> tuple[int, int]:
        return rows, columns

    def add(
        self,
        total: Float[Tensor, "rows columns"],
        x: Float[Tensor, "tokens columns"],
        g: Float[Tensor, "tokens rows"],
    ) -> None:
        total += (g.T @ x).square()

    def finished(self, total: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        return total

    def per_input(self, hessian: Float[Tensor, "rows columns"]) -> Float[Tensor, " columns"]:
        return hessian.sum(0)
