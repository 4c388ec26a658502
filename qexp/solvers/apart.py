"""Sets of columns solved in turn, each by a solver of its own, with errors passed on."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.common.errors import check_choice
from qexp.grid.scale import DTYPES
from qexp.packed.plain import Plain
from qexp.solvers.base import Solution, Solver


def in_turn(
    weight: Float[Tensor, "rows columns"],
    upper: Float[Tensor, "columns columns"],
    parts: Iterable[tuple[int, Solver]],
) -> list[Solution]:
    """Solve each part, a number of adjacent columns by one solver, and pass its error on.

    upper: U with H⁻¹ = Uᵀ U. With s the part and l the columns after it, the part is solved in
    (U_ssᵀ U_ss)⁻¹, the Hessian that is left of its columns when later ones make up for their error
    Δ = Q - W as well as they can. They do: W_l += Δ U_ss⁻¹ U_sl. For GPTQ's sweep that is what one
    sweep over all columns does, so that the parts differ only in their settings.
    """
    rest, first, solutions = weight.float().clone(), 0, []
    for size, solver in parts:
        here, later = slice(first, first + size), slice(first + size, None)
        inverse = left_factor(upper, here)
        solution = solver(rest[:, here], (inverse @ inverse.T).float())
        moved = (solution.weight - rest[:, here]).double() @ inverse
        rest[:, later] += moved.float() @ upper[here, later]
        solutions.append(solution)
        first += size
    return solutions


def left_factor(upper: Float[Tensor, "columns columns"], here: slice) -> Float[Tensor, "size size"]:
    """R with R Rᵀ = (U_ssᵀ U_ss)⁻¹ of these columns, in float64: the Hessian that is left of them
    when later columns make up for their error."""
    block = upper[here, here].double()
    eye = torch.eye(len(block), dtype=torch.float64, device=upper.device)
    return torch.linalg.solve_triangular(block, eye, upper=True)


@dataclass(frozen=True)
class Cast(Solver):
    """Floating-point values of a stored dtype; ignores the Hessian."""

    dtype: str = "float16"

    def __post_init__(self) -> None:
        check_choice("method.solver", self, dtype=DTYPES)

    def check(self, rows: int, columns: int) -> None:
        pass

    @property
    def rowwise(self) -> bool:
        return True

    @property
    def baseline(self) -> Solver:
        return self

    def __call__(
        self,
        weight: Float[Tensor, "rows columns"],
        hessian: Float[Tensor, "columns columns"] | None = None,
    ) -> Solution:
        packed = Plain(weight.to(getattr(torch, self.dtype)))
        return Solution(packed.dequantize(), packed.bits(), packed)
