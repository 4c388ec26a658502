"""HQQ's zero points (Badri and Shaji, Half-Quadratic Quantization, 2023)."""

from dataclasses import dataclass
from math import inf

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.common.errors import UserError, check_bool, check_int, check_positive, check_range
from qexp.grid.base import Grid, Interval, Range
from qexp.grid.ranges import MinMax


@dataclass(frozen=True)
class HalfQuadratic(Range):
    """The min-max interval, shifted by the zero point with the least sum |x - Q(x)|^p.

    The scale stays. Half-quadratic splitting alternates the codes, the errors that the p-norm
    tolerates (`shrunk`), and the zero point as a mean. It tolerates no error below β^(-1/(2-p)),
    0.17 at first, so that on weights of usual size this is alternating least squares of the zero
    point. Unlike min-max it is not invariant to the scale of the weights.

    p: of the norm. beta, growth: the penalty of the splitting, and its factor at each step.
    steps: at most; 0 is min-max. The search ends where the mean absolute error over all rows stops
    falling. As in the reference the last zero point is returned, not the best.
    round_start: the search starts at a rounded zero point. null: only at 4 bits (the reference).
    """

    p: float = 0.7
    beta: float | int = 10.0
    growth: float | int = 1.01
    steps: int = 20
    round_start: bool | None = None

    def __post_init__(self) -> None:
        check_range("range", self, "a number above 0 and at most 1", lambda x: 0 < x <= 1, "p")
        check_positive("range", self, "beta", "growth")
        check_int("range", self, steps=0)
        if self.round_start is not None:
            check_bool("range", self, "round_start")

    def check(self, grid: Grid) -> None:
        needed = {"real_zero": True, "include_zero": False, "symmetric": False}
        if any(getattr(grid, name, None) != value for name, value in needed.items()):
            raise UserError(
                "weight/range=hqq: its zero points are real numbers, and its interval need not "
                "hold 0; give weight.real_zero=true weight.include_zero=false "
                "weight.symmetric=false on weight=int or weight=channel."
            )

    def __call__(
        self,
        x: Float[Tensor, "rows size"],
        grid: Grid,
        counts: Float[Tensor, "rows size"] | None = None,
    ) -> Interval:
        low, high = MinMax()(x, grid, counts)
        if not self.steps:
            return low, high
        q = grid.scale_for(low, high)
        start = grid.bits == 4 if self.round_start is None else self.round_start
        zero = q.zero.round() if start else q.zero
        weight = torch.ones_like(x) if counts is None else counts
        total, beta, least = weight.sum(1, keepdim=True), self.beta, inf
        for _ in range(self.steps):
            codes = grid.encode(x, q._replace(zero=zero))
            error = x - (codes - zero) * q.scale
            kept = shrunk(error, beta, self.p)
            zero = ((codes - (x - kept) / q.scale) * weight).sum(1, keepdim=True) / total
            beta *= self.growth
            mean = float((error.abs() * weight).sum() / weight.sum())
            if mean >= least:
                break
            least = mean
        return -zero * q.scale, (grid.top - zero) * q.scale


def shrunk(error: Float[Tensor, "rows size"], beta: float, p: float) -> Float[Tensor, "rows size"]:
    """sign(e) · max(|e| - |e|^(p-1) / β, 0): the generalized soft threshold of the p-norm."""
    size = error.abs()
    return error.sign() * (size - size.pow(p - 1) / beta).clamp(min=0)
