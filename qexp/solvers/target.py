"""Rounding targets: the matrix near which a solver rounds, given how a layer's inputs have moved.

A layer after quantized ones reads x̃ where the float model reads x. For every Q,
‖Q X̃ - W X‖² = tr((Q - W*) H (Q - W*)ᵀ) + const with H = X̃ X̃ᵀ, G = X X̃ᵀ and W* = W G H⁻¹, so that
asymmetric calibration is the usual problem with another matrix, for every solver. Qronos
(2505.11695) is GPTQ on W* with another rule for the first column.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.common.errors import UserError, check_bool, check_number, check_range
from qexp.solvers.base import Moments, Solver


class Target(ABC):
    @property
    @abstractmethod
    def needs_moments(self) -> bool:
        """Whether the float model's inputs must be carried along."""

    @abstractmethod
    def __call__(
        self, weight: Float[Tensor, "rows columns"], moments: Moments | None
    ) -> Float[Tensor, "rows columns"]:
        """The matrix to round instead of `weight`."""

    @property
    def gives_first(self) -> bool:
        """Whether `first` gives values."""
        return False

    def first(
        self, weight: Float[Tensor, "rows columns"], moments: Moments | None
    ) -> Float[Tensor, "rows columns"] | None:
        """The values from which each column is rounded where it is the first of a sweep; None:
        those of the matrix to round."""
        return None


@dataclass(frozen=True)
class Same(Target):
    """The weight itself: the output that the float layer gives on the inputs of the quantized
    model (GPTQ)."""

    @property
    def needs_moments(self) -> bool:
        return False

    def __call__(
        self, weight: Float[Tensor, "rows columns"], moments: Moments | None
    ) -> Float[Tensor, "rows columns"]:
        return weight


@dataclass(frozen=True)
class Asymmetric(Target):
    """(1 - alpha) W + alpha W (G + λI) (H + λI)⁻¹, λ = damp · mean(diag H): the float output.

    alpha: 0 is `Same`. A value below 1 trusts the estimate less, which is a regression on the
    calibration tokens. Equal inputs (G = H) and a large damping both leave the weight.
    first_column: the first column is rounded from its best value while the others still have their
    float weights, w + alpha W (G - H)_j / H_jj, undamped (Qronos, 2505.11695).
    """

    alpha: float | int = 1.0
    damp: float | int = 0.01
    first_column: bool = False

    def __post_init__(self) -> None:
        check_range("method.target", self, "a number from 0 to 1", lambda x: 0 <= x <= 1, "alpha")
        check_number("method.target", self, damp=0)
        check_bool("method.target", self, "first_column")

    @property
    def needs_moments(self) -> bool:
        return self.alpha > 0

    def __call__(
        self, weight: Float[Tensor, "rows columns"], moments: Moments | None
    ) -> Float[Tensor, "rows columns"]:
        if not self.needs_moments:
            return weight
        assert moments is not None
        return weight + self.alpha * shift(weight, moments, self.damp)

    @property
    def gives_first(self) -> bool:
        return self.first_column and self.needs_moments

    def first(
        self, weight: Float[Tensor, "rows columns"], moments: Moments | None
    ) -> Float[Tensor, "rows columns"] | None:
        if not self.gives_first:
            return None
        assert moments is not None
        diagonal = moments.own.diagonal().double()
        moved = weight.double() @ (moments.cross.double() - moments.own.double())
        dead = diagonal == 0
        best = weight.double() + self.alpha * moved / diagonal.masked_fill(dead, 1)
        return best.masked_fill(dead, 0).to(weight)


def shift(
    weight: Float[Tensor, "rows columns"], moments: Moments, damp: float
) -> Float[Tensor, "rows columns"]:
    """W (G - H) (H + λI)⁻¹, by which W* differs from W; inputs that are always 0 shift nothing.

    Solved in float64: λ is small, and H of few tokens is singular without it.
    """
    own = moments.own.double()
    moved = weight.double() @ (moments.cross.double() - own)
    diagonal = own.diagonal()
    dead = diagonal == 0
    moved = moved.masked_fill(dead, 0)
    damped = own + torch.diag(dead + damp * diagonal.mean())
    return torch.linalg.solve(damped, moved.T).T.to(weight)


def check_together(solver: Solver, target: Target, propagate: bool) -> None:
    """UserError for a solver, a target and inputs that exclude each other."""
    if target.needs_moments and solver.needs_moments:
        raise UserError(
            "method.target=asymmetric with method.solver.carry: both correct for the inputs; "
            "give method/target=same, or method.solver.carry=0."
        )
    if target.gives_first and not solver.takes_first:
        raise UserError(
            f"method.target.first_column=true: {type(solver).__name__} has no rule for its first "
            "column; give false, or method=qronos."
        )
    if (target.needs_moments or solver.needs_moments) and not propagate:
        raise UserError(
            "method.propagate=false: every layer then reads the float model's inputs, from "
            "which method.target=asymmetric and method.solver.carry cannot differ; give "
            "method.propagate=true."
        )
