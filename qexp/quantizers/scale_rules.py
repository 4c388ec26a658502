"""Scales and codes of fake-quantized weights in training: what is fitted, fixed or trained."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.common.errors import FieldError, UserError, check_choice, check_range
from qexp.grid import BlockGrid, Grid, IntGrid, LevelGrid, Scale
from qexp.packed.base import Packed
from qexp.packed.coded import Coded
from qexp.quantizers.fake_quantize import FakeQuantize
from qexp.quantizers.weight import (
    ConstantWeight,
    FakeWeight,
    Frozen,
    Moving,
    Rounded,
)


class ScaleRule(ABC):
    """Source of the scales of weights in training."""

    offset: bool = False  # whether zero points train with them
    trains_scales = True
    has_rounding_variable = False
    moves_codes: bool = False  # whether codes are parameters

    @abstractmethod
    def __call__(
        self, weight: Float[Tensor, "rows columns"], grid: Grid, fake_quantize: FakeQuantize
    ) -> FakeWeight: ...

    def known(self, start: Packed) -> "ScaleRule":
        """The rule for a weight of which another method stored `start`: its codes stay. UserError
        where they cannot."""
        if not isinstance(start, Coded):
            raise UserError(
                f"method.scale: the scales of a stored {type(start).__name__} do not train; give "
                "method/scale=constant."
            )
        return KnownCodes(start)


@dataclass(frozen=True)
class Dynamic(ScaleRule):
    """Fitted to the weights by the grid's range estimator at every step; no gradient. Values inside
    the fitted range are not clipped: with min-max every gradient passes a hard clamp."""

    trains_scales = False

    def __call__(
        self, weight: Float[Tensor, "rows columns"], grid: Grid, fake_quantize: FakeQuantize
    ) -> FakeWeight:
        return Rounded(grid, fake_quantize, None, False)


@dataclass(frozen=True)
class Static(ScaleRule):
    """Fitted once by the grid's range estimator, before training."""

    trains_scales = False

    def __call__(
        self, weight: Float[Tensor, "rows columns"], grid: Grid, fake_quantize: FakeQuantize
    ) -> FakeWeight:
        single_level(grid)
        made = Rounded(grid, fake_quantize, grid.scales_of(weight.detach().float()), False)
        return made.requires_grad_(False)


@dataclass(frozen=True)
class LSQ(ScaleRule):
    """Trained with the weights (1902.08153); with `offset` the zero points too (LSQ+, 2004.09576).

    init: `lsq`, 2 mean|w| / √q_p around a zero in the middle, or `range`, the grid's own fit.
    """

    init: str = "lsq"
    offset: bool = False

    def __post_init__(self) -> None:
        check_choice(None, self, init=("lsq", "range"))

    def __call__(
        self, weight: Float[Tensor, "rows columns"], grid: Grid, fake_quantize: FakeQuantize
    ) -> FakeWeight:
        single_level(grid)
        q = grid.scales_of(weight.detach().float())
        if self.init == "lsq":
            zero = torch.full_like(q.zero, grid.unstored_zero)
            groups = weight.detach().float().abs().reshape(*q.scale.shape, -1)
            mean = groups.mean() if grid.per_tensor else groups.mean(-1)
            scale = 2 * mean / math.sqrt(max(grid.bounds[1] - float(zero.mean()), 1.0))
            q = Scale(scale.expand_as(q.scale).clamp(min=torch.finfo(torch.float32).tiny), zero)
        return Rounded(grid, fake_quantize, q, self.offset and grid.has_zero)


@dataclass(frozen=True)
class FixedCodes(ScaleRule):
    """Codes of round-to-nearest that never change; scales that train, with `offset` zero points
    too (PEQA, 2305.14152; the second phase of EfficientQAT)."""

    offset: bool = False

    def __call__(
        self, weight: Float[Tensor, "rows columns"], grid: Grid, fake_quantize: FakeQuantize
    ) -> FakeWeight:
        single_level(grid)
        weight = weight.detach().float()
        return Frozen(Coded.of(grid, weight, grid.scales_of(weight)), self.offset and grid.has_zero)


@dataclass(frozen=True)
class MovingCodes(ScaleRule):
    """Scales that train, and codes of which a few change after each step of the optimizer, whose
    rate for them is `optimizer.codes` (PV-Tuning, 2405.14852).

    share: of a matrix' weights that may change their code after one step; 0 is `FixedCodes`.
    keep: of what a weight was to move and did not, the share that is added to its next step. 0 is
    the paper's; with share=1, 1 is straight-through training in codes.
    """

    share: float | int = 0.01
    keep: float | int = 0.0
    offset: bool = False
    moves_codes = True

    def __post_init__(self) -> None:
        check_range(None, self, "a number from 0 to 1", lambda x: 0 <= x <= 1, "share", "keep")

    def __call__(
        self, weight: Float[Tensor, "rows columns"], grid: Grid, fake_quantize: FakeQuantize
    ) -> FakeWeight:
        single_level(grid)
        weight = weight.detach().float()
        start = Coded.of(grid, weight, grid.scales_of(weight))
        return Moving(start, self.offset and grid.has_zero, self.share, self.keep)


@dataclass(frozen=True)
class KnownCodes(ScaleRule):
    """Codes and first scales that another method found; scales and zero points that train."""

    start: Coded
    offset: bool = False

    def __call__(
        self, weight: Float[Tensor, "rows columns"], grid: Grid, fake_quantize: FakeQuantize
    ) -> FakeWeight:
        return Frozen(self.start, self.offset and grid.has_zero)


@dataclass(frozen=True)
class Constant(ScaleRule):
    """Nothing of the weight trains: it keeps what another method stored, by default the codes and
    scales of round-to-nearest."""

    trains_scales = False
    start: Packed | None = None

    def __call__(
        self, weight: Float[Tensor, "rows columns"], grid: Grid, fake_quantize: FakeQuantize
    ) -> FakeWeight:
        if self.start is not None:
            return ConstantWeight(self.start)
        weight = weight.detach().float()
        return ConstantWeight(Coded.of(grid, weight, grid.scales_of(weight)))

    def known(self, start: Packed) -> ScaleRule:
        return replace(self, start=start)


def check_scale_rule(rule: ScaleRule, grid: Grid) -> None:
    """FieldError where zero points are to be trained and the grid has none, or rounding and its
    values are not even."""
    if rule.has_rounding_variable and not isinstance(grid, IntGrid | BlockGrid):
        raise FieldError(
            f"scale={type(rule).__name__}: rounding variables are in steps of an even grid; give "
            "weight=int, or another method/scale."
        )
    if rule.trains_scales and isinstance(grid, LevelGrid) and grid.signed_scales:
        raise FieldError(
            "scale: two scales of a group do not train; give weight.signed_scales=false, or "
            "method/scale=dynamic."
        )
    if rule.offset and not grid.has_zero:
        raise FieldError(
            "scale.offset=true: a symmetric grid has no zero points to train; choose one that has "
            "(weight=int), or scale.offset=false."
        )


def single_level(grid: Grid) -> None:
    """UserError for a grid whose scales are quantized in turn."""
    if grid.second_level:
        raise UserError(
            "weight.scales, weight.zeros: scales that train are not quantized in turn; set them to "
            "null, or choose method/scale=dynamic."
        )
