"""Regularizer that drives soft rounding to a decision (AdaRound)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.common.errors import FieldError, check_choice, check_finite, check_range
from qexp.quantizers.rounding_variable import share_up


@dataclass(frozen=True)
class RoundingPenalty:
    """weight · Σ (1 - |2 h(V) - 1|^β) over the rounding variables V (2004.10568, equation 24).

    relative: `weight` is in units of the error of round-to-nearest per weight, and so does not
    depend on how large inputs and steps are; otherwise it is the paper's, for errors that are
    summed over output channels and averaged over tokens. warmup: share of the steps without
    penalty. beta: its first and last value. anneal: how it moves between them, `cosine` (AIMET's
    code) or `linear` (BRECQ's).
    """

    weight: float = 100.0
    relative: bool = True
    warmup: float = 0.2
    beta: tuple[float, float] | list[float] = (20.0, 2.0)
    anneal: str = "cosine"

    def __post_init__(self) -> None:
        check_finite(None, self, "weight")
        check_range(None, self, "a number from 0 to 1", lambda x: 0 <= x <= 1, "warmup")
        check_choice(None, self, anneal=("cosine", "linear"))
        valid = (type(beta) in (int, float) and 0 < beta < math.inf for beta in self.beta)
        if len(self.beta) != 2 or not all(valid):
            raise FieldError(f"beta={self.beta}: give two numbers above 0.")

    def beta_at(self, step: float, steps: int) -> float:
        """β at a step, from the end of the warmup on."""
        first, last = self.beta
        rise = self.warmup * steps
        done = min(max((step - rise) / max(steps - rise, 1), 0.0), 1.0)
        left = (1 + math.cos(math.pi * done)) / 2 if self.anneal == "cosine" else 1 - done
        return last + (first - last) * left

    def __call__(
        self, rounding: Sequence[Float[Tensor, "rows columns"]], step: int, steps: int
    ) -> Float[Tensor, ""]:
        if step < self.warmup * steps:
            return torch.zeros((), device=rounding[0].device)
        beta = self.beta_at(step, steps)
        undecided = [(1 - (2 * share_up(v) - 1).abs().pow(beta)).sum() for v in rounding]
        return self.weight * torch.stack(undecided).sum()
