"""Roundings that are not to nearest while a model trains: stochastic, or annealed to nearest."""

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.common.errors import FieldError, check_positive, check_range
from qexp.gradients import RoundingGradient
from qexp.grid.clipping import Number


@dataclass(frozen=True)
class Stochastic(RoundingGradient):
    """Up with the probability of the distance to the code below, so that the mean is the value
    itself (1502.02551); random numbers are torch's. The gradient is straight-through."""

    is_nearest: ClassVar[bool] = False

    def value(self, c: Float[Tensor, "*shape"]) -> Tensor:
        return stochastic(c)

    def back(self, c: Float[Tensor, "*shape"], g: Float[Tensor, "*shape"], steps: Number) -> Tensor:
        return g


def stochastic(c: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """floor(c) + [t < c - floor(c)] with t uniform: c in the mean, and c itself if it is whole."""
    below = c.floor()
    return below + (torch.rand_like(c) < c - below)


@dataclass(frozen=True)
class Annealed(RoundingGradient):
    """From the value itself to the nearest code in the course of training; the gradient passes.

    start, end: shares of the steps between which the share `left` of the way to the value falls
    from 1 to 0, as a mirrored logistic function with `steepness`, scaled to end there exactly;
    0: a straight line. After `end` rounding is to nearest.
    """

    start: Number = 0.0
    end: Number = 0.8
    steepness: Number = 10.0
    left: float = 1.0
    is_nearest: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_range(None, self, "a number from 0 to 1", lambda x: 0 <= x <= 1, "start", "end")
        if self.start > self.end:
            raise FieldError(f"start={self.start}: annealing ends at {self.end}; give less.")
        if self.steepness != 0:
            check_positive(None, self, "steepness")

    def at(self, step: int, steps: int) -> "RoundingGradient":
        return replace(self, left=self._left(step / steps))

    def _left(self, time: float) -> float:
        if time >= self.end:
            return 0.0
        done = max(time - self.start, 0.0) / (self.end - self.start)
        if not self.steepness:
            return 1 - done
        first, now, last = (1 / (1 + math.exp(self.steepness * (x - 0.5))) for x in (0, done, 1))
        return (now - last) / (first - last)

    def value(self, c: Float[Tensor, "*shape"]) -> Tensor:
        return self.part(c) if self.left else c.round()

    @abstractmethod
    def part(self, c: Float[Tensor, "*shape"]) -> Tensor:
        """The value where a share `left`, above 0, of the way is left."""

    def back(self, c: Float[Tensor, "*shape"], g: Float[Tensor, "*shape"], steps: Number) -> Tensor:
        return g


@dataclass(frozen=True)
class PARQ(Annealed):
    """The proximal map of a piecewise-affine regularizer (2503.15748): between two codes a line
    through the middle, of slope 1 / left, cut at both. On a grid with even steps."""

    def part(self, c: Float[Tensor, "*shape"]) -> Tensor:
        below = c.floor()
        return below + ((c - below - 0.5) / self.left + 0.5).clamp(0, 1)


@dataclass(frozen=True)
class Relaxed(Annealed):
    """The mean of the value and its nearest code, weighted by `left` and 1 - left (BinaryRelax,
    1801.06313)."""

    def part(self, c: Float[Tensor, "*shape"]) -> Tensor:
        return torch.lerp(c.round(), c, self.left)
