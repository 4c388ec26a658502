"""Hessians of the model's output loss, from gradients (OAC, 2405.15025).

With x_t a layer's inputs and g_t the gradients of the cross-entropy at its outputs, sequence n has
the weight gradient G[n] = Σ_t g_t x_tᵀ. OAC's Hessian is Σ_n G[n]ᵀ G[n], the rows' blocks of the
empirical Fisher matrix added up; keeping only the terms of one token with itself leaves the
activation Hessian weighted by ‖g_t‖².
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from jaxtyping import Float
from torch import Tensor

from qexp.common.errors import check_int
from qexp.hessian import layerwise
from qexp.hessian.base import one_sided
from qexp.hessian.from_gradients import FromGradients
from qexp.hessian.layerwise import add_symmetric, mirrored
from qexp.solvers.base import Solver
from qexp.solvers.by_rows import ByRows

Factors = tuple[Float[Tensor, "_ _"], Float[Tensor, "_ _"]]  # of one shape, another in each pair
Matrices = tuple[Sequence[Float[Tensor, "_ _"]], Sequence[Float[Tensor, "_ _"]]]


@dataclass(frozen=True)
class Gram(FromGradients):
    """Base of Hessians that consist of matrices to which a sequence adds AᵀB, known to be
    symmetric."""

    @abstractmethod
    def matrices(self, hessian: Float[Tensor, "..."], columns: int) -> Matrices:
        """Views of its matrices: those of the inputs, then those of the outputs."""

    @abstractmethod
    def factors(
        self, x: Float[Tensor, "tokens columns"], g: Float[Tensor, "tokens rows"]
    ) -> list[Factors]:
        """A and B of one sequence for each of `matrices`."""

    def add(
        self,
        total: Float[Tensor, "..."],
        x: Float[Tensor, "tokens columns"],
        g: Float[Tensor, "tokens rows"],
    ) -> None:
        inputs, outputs = self.matrices(total, x.shape[1])
        for matrix, pair in zip([*inputs, *outputs], self.factors(x, g), strict=True):
            add_symmetric(matrix, *pair)

    def finished(self, total: Float[Tensor, "..."], columns: int) -> Float[Tensor, "..."]:
        for side in self.matrices(total, columns):
            for matrix in side:
                mirrored(matrix)
        return total

    def per_input(
        self, hessian: Float[Tensor, "..."], columns: int
    ) -> list[Float[Tensor, " columns"]]:
        return [matrix.diagonal() for matrix in self.matrices(hessian, columns)[0]]

    @property
    def code(self) -> tuple[ModuleType, ...]:
        return (*super().code, layerwise)


@dataclass(frozen=True)
class OfInputs(Gram):
    """Base of Hessians of the inputs: [columns, columns], or one for each group of rows.

    groups: of adjacent rows; each has a Hessian from the gradients at its own outputs, and is
    solved by itself (GuidedQuant, 2505.07004).
    """

    groups: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("method.hessian", self, groups=1)

    @abstractmethod
    def factors_of(
        self, x: Float[Tensor, "tokens columns"], g: Float[Tensor, "tokens rows"]
    ) -> Factors:
        """A and B of AᵀB for the rows of one group."""

    def shape(self, rows: int, columns: int) -> tuple[int, ...]:
        return (columns, columns) if self.is_matrix else (self.groups, columns, columns)

    def matrices(self, hessian: Float[Tensor, "..."], columns: int) -> Matrices:
        return hessian.view(-1, columns, columns).unbind(), ()

    def factors(
        self, x: Float[Tensor, "tokens columns"], g: Float[Tensor, "tokens rows"]
    ) -> list[Factors]:
        return [self.factors_of(x, part) for part in g.chunk(self.groups, 1)]

    @property
    def is_matrix(self) -> bool:
        return self.groups == 1

    def adapted(self, solver: Solver) -> Solver:
        solver = one_sided(solver)
        return solver if self.is_matrix else ByRows(solver, self.groups)


@dataclass(frozen=True)
class OutputAdaptive(OfInputs):
    """Σ_n G[n]ᵀ G[n], one gradient per sequence (OAC, Algorithm 1)."""

    between = True

    def factors_of(
        self, x: Float[Tensor, "tokens columns"], g: Float[Tensor, "tokens rows"]
    ) -> Factors:
        if through_tokens(len(x), g.shape[1], x.shape[1]):
            return x, (g @ g.T) @ x
        gradient = g.T @ x
        return gradient, gradient


@dataclass(frozen=True)
class TokenWeighted(OfInputs):
    """Σ_t ‖g_t‖² x_t x_tᵀ: tokens weighted by the squared gradient norm at the layer's output."""

    def factors_of(
        self, x: Float[Tensor, "tokens columns"], g: Float[Tensor, "tokens rows"]
    ) -> Factors:
        weighted = x * g.norm(dim=1, keepdim=True)
        return weighted, weighted


def through_tokens(tokens: int, rows: int, columns: int) -> bool:
    """Whether Xᵀ (ΔΔᵀ) X takes fewer multiplications than (ΔᵀX)ᵀ (ΔᵀX), half of either last product
    being saved by symmetry."""
    by_gradient = tokens * rows * columns + rows * columns**2 / 2
    by_tokens = tokens**2 * (rows + columns) + tokens * columns**2 / 2
    return by_tokens < by_gradient
