"""What training differentiates in place of rounding and clamping, whose own slopes say nothing.

Forward values are those of `torch.round` and `torch.clamp`, bit for bit (but for `Soft` with
forward=soft); only what flows back differs. Codes are in units of one step, so the width of every
surrogate is measured in steps. Formulas, with v = x/s + z, c = clamp(v), q = round(c), and
y = s(q - z), R and C the slopes given to rounding and clamping:

    dy/dx = R C        dy/ds = (q - z) - (v - z) R C        dy/dz = s (R C - 1)

R = 1 where C clipped: there rounding meets a whole number that it cannot move. What is clipped lies
beyond the end codes; with a dynamic range, beyond the range fitted (see `Grid.position`). With
R = 1 and C the indicator of the range this is LSQ (1902.08153).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qexp.common.errors import check_choice, check_finite, check_positive, check_range
from qexp.grid.clipping import Number, inside

TINY = torch.finfo(torch.float32).tiny


class RoundingGradient(ABC):
    """Rounding with a gradient of its own."""

    @abstractmethod
    def back(self, c: Float[Tensor, "*shape"], g: Float[Tensor, "*shape"], steps: Number) -> Tensor:
        """The gradient at `c` when `g` arrives at round(c). steps: from end to end of the grid."""

    def __call__(self, c: Float[Tensor, "*shape"], steps: Number = 1) -> Float[Tensor, "*shape"]:
        rounded: Tensor = _Round.apply(c, self, steps)
        return rounded


@dataclass(frozen=True)
class Straight(RoundingGradient):
    """The straight-through estimator: rounding is taken for the identity (1308.3432)."""

    def back(self, c: Float[Tensor, "*shape"], g: Float[Tensor, "*shape"], steps: Number) -> Tensor:
        return g


@dataclass(frozen=True)
class Sigmoid(RoundingGradient):
    """The slope of floor(c) + sigmoid(T (c - floor(c) - ½)) (2410.10849).

    mode: `raw` is that slope, of mean tanh(T/4); `author` adds the 1/(e^T + 1) of the first
    author's code, which keeps it off zero; `norm` divides by the mean: the straight-through
    estimator at T → 0, and DSQ's slope at alpha = 1 - tanh(T/4). `mean` is the control: that mean
    everywhere, so that what `raw` does beyond a smaller step shows.
    """

    temperature: Number = 5.0
    mode: str = "author"

    def __post_init__(self) -> None:
        check_choice(None, self, mode=("author", "norm", "raw", "mean"))
        check_positive(None, self, "temperature")

    def back(self, c: Float[Tensor, "*shape"], g: Float[Tensor, "*shape"], steps: Number) -> Tensor:
        t = self.temperature
        if self.mode == "mean":
            return g * math.tanh(t / 4)
        steep = t / math.tanh(t / 4) if self.mode == "norm" else t
        made = _bell(g, _offset(c).mul_(t)).mul_(steep)
        if self.mode == "author":  # e^-T / (1 + e^-T): e^T itself overflows
            made.add_(g, alpha=max(math.exp(-t) / (1 + math.exp(-t)), TINY))
        return made


@dataclass(frozen=True)
class DSQ(RoundingGradient):
    """The slope of the tanh between two steps (1908.05033): alpha, half of the step's height that
    the tanh leaves to a jump, is fixed here; the paper may learn it."""

    alpha: Number = 0.2

    def __post_init__(self) -> None:
        check_range(None, self, "a number between 0 and 1", lambda x: 0 < x < 1, "alpha")

    def back(self, c: Float[Tensor, "*shape"], g: Float[Tensor, "*shape"], steps: Number) -> Tensor:
        k = math.log(2 / self.alpha - 1)
        height = 1 / (1 - self.alpha)
        # tanh k u = 2 sigmoid(2 k u) - 1, which costs a tenth
        return _bell(g, _offset(c).mul_(2 * k)).mul_(2 * height * k)


@dataclass(frozen=True)
class EWGS(RoundingGradient):
    """Gradients scaled by the rounding error where it agrees with them in sign (2104.00903):
    g (1 + δ sign(g) (c - round(c)) / steps), the error on a grid from 0 to 1, as the paper has it.
    delta is fixed here (the paper may set it from the Hessian's trace).
    """

    delta: Number = 1e-3

    def __post_init__(self) -> None:
        check_finite(None, self, "delta")

    def back(self, c: Float[Tensor, "*shape"], g: Float[Tensor, "*shape"], steps: Number) -> Tensor:
        agreed = (c - c.round()).mul_(g.sign())
        return agreed.mul_(self.delta / steps).add_(1).mul_(g)


class ClampGradient(ABC):
    """Clamping with a slope of its own."""

    # Two things that only `Formula` does: whether values that are not clipped move the step size,
    # as in LSQ, and from which magnitude on, in the data's own units, gradients stop.
    steps_inside: bool = True
    limit: Number | None = None

    @property
    def clips(self) -> bool:
        """Whether training sees values that lie beyond an end as that end."""
        return True

    @abstractmethod
    def value(self, v: Float[Tensor, "*shape"], low: Number, high: Number) -> Tensor:
        """What training sees of `v`."""

    @abstractmethod
    def back(
        self, v: Float[Tensor, "*shape"], g: Float[Tensor, "*shape"], low: Number, high: Number
    ) -> Tensor:
        """The gradient at `v` when `g` arrives at its clamped value; a tensor of its own."""

    def __call__(
        self, v: Float[Tensor, "*shape"], low: Number, high: Number
    ) -> Float[Tensor, "*shape"]:
        clamped: Tensor = _Clamp.apply(v, self, float(low), float(high))
        return clamped


@dataclass(frozen=True)
class Hard(ClampGradient):
    """Clipped values have no gradient. Without `steps_inside` they alone move the step size, as
    PACT's clipping level gets the gradient of what lies beyond it (1805.06085). limit: values from
    there on have no gradient either, though nothing clips them: LLM-QAT's code does so at 2."""

    steps_inside: bool = True
    limit: Number | None = None

    def __post_init__(self) -> None:
        if self.limit is not None:
            check_positive(None, self, "limit")

    def value(self, v: Float[Tensor, "*shape"], low: Number, high: Number) -> Tensor:
        return v.clamp(low, high)

    def back(
        self, v: Float[Tensor, "*shape"], g: Float[Tensor, "*shape"], low: Number, high: Number
    ) -> Tensor:
        return inside(v, low, high).mul_(g)


@dataclass(frozen=True)
class Soft(ClampGradient):
    """SoftClamp (2410.10849): a + h(v - a) - h(v - b), with h(u) = u g(u) an activation.

    gate: `gelu`, g = Φ(k u), or `silu`, g = sigmoid(k u), k the sharpness; grids of two bits want
    k ≥ 2, since both ends must lie far apart. forward: `hard` clamps as ever and only the slope
    is soft; `soft` trains on the soft value too.
    """

    gate: str = "gelu"
    sharpness: Number = 1.0
    forward: str = "hard"

    def __post_init__(self) -> None:
        check_choice(None, self, gate=("gelu", "silu"), forward=("hard", "soft"))
        check_positive(None, self, "sharpness")

    @property
    def clips(self) -> bool:
        return self.forward == "hard"

    def soft(self, v: Float[Tensor, "*shape"], low: Number, high: Number) -> Tensor:
        k, h = self.sharpness, F.gelu if self.gate == "gelu" else F.silu
        return low + h(k * (v - low)) / k - h(k * (v - high)) / k

    def value(self, v: Float[Tensor, "*shape"], low: Number, high: Number) -> Tensor:
        return v.clamp(low, high) if self.forward == "hard" else self.soft(v, low, high)

    def back(
        self, v: Float[Tensor, "*shape"], g: Float[Tensor, "*shape"], low: Number, high: Number
    ) -> Tensor:
        k, aten = self.sharpness, torch.ops.aten
        rise = aten.gelu_backward if self.gate == "gelu" else aten.silu_backward
        u = v if k == 1 else k * v
        made: Tensor = rise(g, u - k * low if low else u).sub_(rise(g, u - k * high))
        return made


def _offset(c: Tensor) -> Tensor:
    """From the middle between two codes, in steps; a tensor of its own."""
    return (c - c.floor()).sub_(0.5)


def _bell(g: Tensor, u: Tensor) -> Tensor:
    """g times the slope of the sigmoid at u, which is overwritten."""
    made: Tensor = torch.ops.aten.sigmoid_backward(g, u.sigmoid_())
    return made


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, c: Tensor, rounding: RoundingGradient, steps: Number) -> Tensor:
        ctx.save_for_backward(c)
        ctx.rounding, ctx.steps = rounding, steps
        return c.round()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.rounding.back(ctx.saved_tensors[0], grads[0], ctx.steps), None, None


class _Clamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, clamp: ClampGradient, low: Number, high: Number) -> Tensor:
        ctx.save_for_backward(v)
        ctx.clamp, ctx.bounds = clamp, (low, high)
        return clamp.value(v, low, high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.clamp.back(ctx.saved_tensors[0], grads[0], *ctx.bounds), None, None, None
