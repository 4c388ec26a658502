"""Solvers around another solver."""

from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from qexp.solvers.base import Moments, Solution, Solver


@dataclass(frozen=True)
class Wrapper(Solver):
    """Base of solvers that call another one: what they do not change is that of `base`."""

    base: Solver

    def check(self, rows: int, columns: int) -> None:
        self.base.check(rows, columns)

    @property
    def rowwise(self) -> bool:
        return self.base.rowwise

    @property
    def baseline(self) -> Solver:
        return self.base.baseline

    def least_bits(self, rows: int, columns: int) -> float:
        return self.base.least_bits(rows, columns)

    def with_bits(self, bits: int) -> Solver:
        return replace(self, base=self.base.with_bits(bits))

    @property
    def needs_moments(self) -> bool:
        return self.base.needs_moments

    @property
    def takes_first(self) -> bool:
        return self.base.takes_first

    def aim(
        self, target: Float[Tensor, "rows columns"], moments: Moments | None
    ) -> Float[Tensor, "rows columns"]:
        return self.base.aim(target, moments)

    def measure(
        self, change: Float[Tensor, "rows columns"], hessian: Float[Tensor, "..."] | None
    ) -> float:
        return self.base.measure(change, hessian)

    @property
    def tolerance(self) -> float:
        return self.base.tolerance


@dataclass(frozen=True)
class OfDiagonal(Wrapper):
    """A solver that needs a diagonal, in the diagonal of a Hessian [columns, columns]."""

    def __call__(
        self,
        weight: Float[Tensor, "rows columns"],
        hessian: Float[Tensor, "columns columns"],
        **extra: Any,
    ) -> Solution:
        return self.base(weight, hessian.diagonal()[None], **extra)

    def measure(
        self,
        change: Float[Tensor, "rows columns"],
        hessian: Float[Tensor, "columns columns"] | None,
    ) -> float:
        return self.base.measure(change, None if hessian is None else hessian.diagonal()[None])
