"""The Hessian of the model's output loss as a Kronecker product of an input and an output side."""

from dataclasses import dataclass
from types import ModuleType

from jaxtyping import Float
from torch import Tensor

from qexp.common.errors import UserError
from qexp.hessian.output import Factors, Gram, Matrices
from qexp.solvers import both_sides
from qexp.solvers.base import Solver
from qexp.solvers.both_sides import sides


@dataclass(frozen=True)
class BothSides(Gram):
    """Σ_n G[n]ᵀ G[n] of the inputs and Σ_n G[n] G[n]ᵀ of the outputs, as `both_sides.joined` has
    them: the factors of the Fisher matrix of the weights (YAQA, 2505.22988, sketch B)."""

    def shape(self, rows: int, columns: int) -> tuple[int, ...]:
        return (columns**2 + rows**2,)

    def matrices(self, hessian: Float[Tensor, "..."], columns: int) -> Matrices:
        inputs, outputs = sides(hessian, columns)
        return (inputs,), (outputs,)

    def factors(
        self, x: Float[Tensor, "tokens columns"], g: Float[Tensor, "tokens rows"]
    ) -> list[Factors]:
        gradient = g.T @ x
        return [(gradient, gradient), (gradient.T, gradient.T)]

    @property
    def is_matrix(self) -> bool:
        return False

    def adapted(self, solver: Solver) -> Solver:
        if not solver.needs_both_sides:
            raise UserError(
                f"method.hessian: BothSides has a Hessian of the outputs, which "
                f"{type(solver).__name__} does not use; give method=yaqa, or method/hessian=output."
            )
        return solver

    @property
    def code(self) -> tuple[ModuleType, ...]:
        return (*super().code, both_sides)
