"""Interface of solvers, and the solution they return."""

from abc import ABC, abstractmethod
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from qexp.packed.base import Packed


class Solution(NamedTuple):
    """A rounded matrix and its stored form.

    damp: the damping that was needed, as a share of the mean diagonal; 0 where none is used.
    paper_bits: average bits as the method's own paper counts them, where that is another number.
    """

    weight: Float[Tensor, "rows columns"]
    bits: float
    packed: Packed
    damp: float = 0.0
    paper_bits: float | None = None


class Solver(ABC):
    @abstractmethod
    def __call__(
        self,
        weight: Float[Tensor, "rows columns"],
        hessian: Float[Tensor, "columns columns"],
    ) -> Solution:
        """Round `weight` so that tr(Δ H Δᵀ) is small. The result does not depend on H's scale."""

    @abstractmethod
    def check(self, rows: int, columns: int) -> None:
        """UserError when a [rows, columns] matrix does not fit the settings."""

    @property
    @abstractmethod
    def rowwise(self) -> bool:
        """Whether each row's result depends on that row and H alone, so that matrices which share
        an input may be solved as one stacked matrix."""

    @property
    @abstractmethod
    def baseline(self) -> "Solver":
        """Rounding to nearest on the same grid: what the result must not be worse than."""

    @property
    def tolerance(self) -> float:
        """By which share the calibrated error may exceed the baseline's all the same."""
        return 1e-3
