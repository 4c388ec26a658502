"""Interface of solvers, and the solution they return."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.common.errors import UserError
from qexp.packed.base import Packed

# Columns per strip of the triangle that `error` computes.
STRIP = 512


class Moments(NamedTuple):
    """Second moments of a layer's inputs x̃ and of the float model's inputs x at the same tokens.

    own: 2/N Σ x̃ x̃ᵀ. cross: 2/N Σ x x̃ᵀ, rows of the float side.
    """

    own: Float[Tensor, "columns columns"]
    cross: Float[Tensor, "columns columns"]


class Solution(NamedTuple):
    """A rounded matrix and its stored form.

    bits: stored bits per weight.
    damp: the damping that was used, as a share of the mean diagonal of H; 0 for none.
    paper_bits: average bits as the method's paper counts them, where that number differs.
    """

    weight: Float[Tensor, "rows columns"]
    bits: float
    packed: Packed
    damp: float = 0.0
    paper_bits: float | None = None


def error(
    change: Float[Tensor, "rows columns"], hessian: Float[Tensor, "columns columns"] | None
) -> float:
    """tr(Δ H Δᵀ); the squared norm of Δ without a Hessian.

    H is symmetric, so that strips of its part on and above the diagonal are enough: half of the
    work, and no product as large as Δ.
    """
    change = change.float()
    if hessian is None:
        return float(torch.sum(change * change, dtype=torch.float64))
    total = torch.zeros((), dtype=torch.float64, device=change.device)
    for start in range(0, change.shape[1], STRIP):
        strip = slice(start, start + STRIP)
        moved = change[:, strip] @ hessian[strip, strip]
        if start:
            moved.addmm_(change[:, :start], hessian[:start, strip], alpha=2)
        total += torch.sum(moved.mul_(change[:, strip]), dtype=torch.float64)
    return float(total)


class Solver(ABC):
    @abstractmethod
    def __call__(
        self,
        weight: Float[Tensor, "rows columns"],
        hessian: Float[Tensor, "..."],
    ) -> Solution:
        """Round `weight` so that `measure` of the change is small: unless a solver says otherwise
        tr(Δ H Δᵀ) with H [columns, columns]. Scaling H does not change the result."""

    @abstractmethod
    def check(self, rows: int, columns: int) -> None:
        """UserError when the settings do not fit a [rows, columns] matrix."""

    @property
    @abstractmethod
    def rowwise(self) -> bool:
        """Whether each row's result depends only on that row and H, so that matrices with the same
        input can be solved as one stacked matrix."""

    @property
    @abstractmethod
    def baseline(self) -> "Solver":
        """Round-to-nearest on the same grid; the result must not be worse."""

    def least_bits(self, rows: int, columns: int) -> float:
        """Stored bits per weight that every solution of a [rows, columns] matrix takes, as far as
        they are known without solving."""
        return 0.0

    def with_bits(self, bits: int) -> "Solver":
        """The solver with codes of `bits` bits. UserError where it has no codes of any width."""
        raise UserError(
            f"method.options={bits}: {type(self).__name__} has no bit width that could be chosen; "
            "give a solver on weight=int, such as method@method.quantization=gptq."
        )

    @property
    def needs_moments(self) -> bool:
        """Whether the solver is called with an argument `moments`, those of the inputs."""
        return False

    @property
    def takes_first(self) -> bool:
        """Whether the solver can be called with an argument `first`, see `target.Target.first`."""
        return False

    def aim(
        self, target: Float[Tensor, "rows columns"], moments: Moments | None
    ) -> Float[Tensor, "rows columns"]:
        """The matrix from which the solver's error is measured when it rounds `target`."""
        return target

    @property
    def needs_both_sides(self) -> bool:
        """Whether the solver is called with a Hessian of both sides (`both_sides.joined`)."""
        return False

    @property
    def needs_diagonal(self) -> bool:
        """Whether the solver is called with the diagonals of the rows' Hessians in place of a
        matrix: [rows, columns], or [1, columns] where all rows have the same."""
        return False

    def measure(
        self, change: Float[Tensor, "rows columns"], hessian: Float[Tensor, "..."] | None
    ) -> float:
        """The objective of the solver, for a change of the matrix that it rounds."""
        return error(change, hessian)

    @property
    def tolerance(self) -> float:
        """By how much the calibrated error may exceed the baseline's, as a share of the latter."""
        return 1e-3
