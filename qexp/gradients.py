"""Surrogate gradients of rounding and clamping, for quantization-aware training.

Forward values equal those of `torch.round` and `torch.clamp` bit for bit (except `Soft` with
forward=soft, and where `is_nearest` is false). The width of every surrogate is in steps. With
v = x/s + z, c = clamp(v), q = round(c), y = s(q - z), and R and C the slopes of the surrogates:

    dy/dx = R C        dy/ds = (q - z) - (v - z) R C        dy/dz = s (R C - 1)

R = 1 where C clipped. What is clipped lies beyond the end codes; with a dynamic range, beyond the
range fitted (see `Grid.position`). With R = 1 and C its indicator this is LSQ (1902.08153).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qexp.common.errors import check_choice, check_finite, check_number, check_positive, check_range
from qexp.grid.clipping import Number, inside

TINY = torch.finfo(torch.float32).tiny


class RoundingGradient(ABC):
    """Rounding with a surrogate gradient."""

    is_nearest: ClassVar[bool] = True  # whether training, too, rounds like `torch.round`

    def at(self, step: int, steps: int) -> "RoundingGradient":
        """The rounding at a step of training, counted from 0, of `steps`."""
        return self

    def value(self, c: Float[Tensor, "*shape"]) -> Tensor:
        """The rounded value in the forward pass of training; whole numbers stay what they are."""
        return c.round()

    @abstractmethod
    def back(self, c: Float[Tensor, "*shape"], g: Float[Tensor, "*shape"], steps: Number) -> Tensor:
        """The gradient at `c`, given `g` at round(c). steps: the number of steps of the grid."""

    def __call__(self, c: Float[Tensor, "*shape"], steps: Number = 1) -> Float[Tensor, "*shape"]:
        rounded: Tensor = _Round.apply(c, self, steps)
        return rounded


@dataclass(frozen=True)
class Straight(RoundingGradient):
    """Straight-through estimator: the slope of rounding is 1 (1308.3432)."""

    def back(self, c: Float[Tensor, "*shape"], g: Float[Tensor, "*shape"], steps: Number) -> Tensor:
        return g


@dataclass(frozen=True)
class Sigmoid(RoundingGradient):
    """The slope of floor(c) + sigmoid(T (c - floor(c) - ½)) (2410.10849).

    mode: `raw` is that slope, with mean tanh(T/4). `author` adds the 1/(e^T + 1) of the first
    author's code, which keeps the slope above zero. `norm` divides by the mean: T → 0 gives the
    straight-through estimator, and alpha = 1 - tanh(T/4) gives DSQ's slope. `mean` is a control:
    the mean as a constant slope, which separates the shape of `raw` from its smaller step.
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
        grad = _bell(g, _offset(c).mul_(t)).mul_(steep)
        if self.mode == "author":  # e^-T / (1 + e^-T): e^T itself overflows
            grad.add_(g, alpha=max(math.exp(-t) / (1 + math.exp(-t)), TINY))
        return grad


@dataclass(frozen=True)
class DSQ(RoundingGradient):
    """The slope of the scaled tanh between two codes (1908.05033). alpha: 1 minus the largest value
    of the tanh before scaling; fixed here, the paper can learn it."""

    alpha: Number = 0.2

    def __post_init__(self) -> None:
        check_range(None, self, "a number between 0 and 1", lambda x: 0 < x < 1, "alpha")

    def back(self, c: Float[Tensor, "*shape"], g: Float[Tensor, "*shape"], steps: Number) -> Tensor:
        k = math.log(2 / self.alpha - 1)
        height = 1 / (1 - self.alpha)
        # tanh k u = 2 sigmoid(2 k u) - 1, at a tenth of the cost
        return _bell(g, _offset(c).mul_(2 * k)).mul_(2 * height * k)


@dataclass(frozen=True)
class EWGS(RoundingGradient):
    """Element-wise gradient scaling by the rounding error (2104.00903).

    g (1 + δ sign(g) (c - round(c)) / steps): the error on a grid from 0 to 1, as in the paper.
    delta is fixed here; the paper can also set it from the Hessian's trace.
    """

    delta: Number = 1e-3

    def __post_init__(self) -> None:
        check_finite(None, self, "delta")

    def back(self, c: Float[Tensor, "*shape"], g: Float[Tensor, "*shape"], steps: Number) -> Tensor:
        signed_error = (c - c.round()).mul_(g.sign())
        return signed_error.mul_(self.delta / steps).add_(1).mul_(g)


class ClampGradient(ABC):
    """Clamping with a surrogate gradient."""

    # Only `FakeQuantize` reads these two: whether values that are not clipped also move the step
    # size, as in LSQ, and the magnitude, in units of the data, from which gradients are zero.
    steps_inside: bool = True
    limit: Number | None = None

    @property
    def clips(self) -> bool:
        """Whether the forward pass sets values outside the range to the nearest bound."""
        return True

    @abstractmethod
    def value(self, v: Float[Tensor, "*shape"], low: Number, high: Number) -> Tensor:
        """The clamped value of `v` in the forward pass."""

    @abstractmethod
    def back(
        self, v: Float[Tensor, "*shape"], g: Float[Tensor, "*shape"], low: Number, high: Number
    ) -> Tensor:
        """The gradient at `v`, given `g` at its clamped value; always a new tensor."""

    def __call__(
        self, v: Float[Tensor, "*shape"], low: Number, high: Number
    ) -> Float[Tensor, "*shape"]:
        clamped: Tensor = _Clamp.apply(v, self, float(low), float(high))
        return clamped


@dataclass(frozen=True)
class Hard(ClampGradient):
    """Clipped values get no gradient.

    steps_inside: false lets only clipped values move the step size, like PACT's clipping level
    (1805.06085). limit: values of this magnitude or more get no gradient either, although they are
    not clipped; LLM-QAT's code uses 2. beyond: steps past either end at which values still get
    their gradient (ParetoQ, 2502.02631: half a step; BitNet b1.58: inf).
    """

    steps_inside: bool = True
    limit: Number | None = None
    beyond: Number = 0.0

    def __post_init__(self) -> None:
        check_number(None, self, beyond=0)
        if self.limit is not None:
            check_positive(None, self, "limit")

    def value(self, v: Float[Tensor, "*shape"], low: Number, high: Number) -> Tensor:
        return v.clamp(low, high)

    def back(
        self, v: Float[Tensor, "*shape"], g: Float[Tensor, "*shape"], low: Number, high: Number
    ) -> Tensor:
        return inside(v, low - self.beyond, high + self.beyond).mul_(g)


@dataclass(frozen=True)
class Soft(ClampGradient):
    """SoftClamp (2410.10849): a + h(v - a) - h(v - b), with h(u) = u g(u) an activation.

    gate: `gelu`, g = Φ(k u), or `silu`, g = sigmoid(k u), with k the sharpness. Grids of 2 bits
    need k ≥ 2, because the two bounds must lie far apart. forward: `hard` is the ordinary clamp and
    only the slope is soft; `soft` also trains on the soft value.
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
        grad: Tensor = rise(g, u - k * low if low else u).sub_(rise(g, u - k * high))
        return grad


def _offset(c: Tensor) -> Tensor:
    """Distance from the midpoint between two codes, in steps; a new tensor."""
    return (c - c.floor()).sub_(0.5)


def _bell(g: Tensor, u: Tensor) -> Tensor:
    """g times the slope of the sigmoid at u. Overwrites u."""
    grad: Tensor = torch.ops.aten.sigmoid_backward(g, u.sigmoid_())
    return grad


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, c: Tensor, rounding: RoundingGradient, steps: Number) -> Tensor:
        ctx.save_for_backward(c)
        ctx.rounding, ctx.steps = rounding, steps
        return rounding.value(c)

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
