"""Weights that are rounded as they are used, so that what is behind them can train."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qexp.errors import FieldError, UserError, known, switches
from qexp.fused import Formula, gain, placed
from qexp.grid import Grid, Scale
from qexp.packed import Coded


class FakeWeight(nn.Module, ABC):
    """A parametrization of `Linear.weight`: the weight behind it, on the grid."""

    @abstractmethod
    def forward(self, weight: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]: ...

    @abstractmethod
    def scales(self, weight: Float[Tensor, "rows columns"]) -> Scale:
        """[rows, groups], as storage would keep them."""

    @abstractmethod
    def coded(self, weight: Float[Tensor, "rows columns"]) -> Coded:
        """What storage keeps: its values are those of `forward`, bit for bit."""


class Rounded(FakeWeight):
    """Rounded to nearest by the project's formula, scales fitted at every use or trained."""

    def __init__(self, grid: Grid, formula: Formula, q: Scale | None, offset: bool) -> None:
        super().__init__()
        self.grid, self.formula = grid, formula
        self.scale = self.zero = None
        self.reach = 1.0
        if q is not None:
            kept = slice(1 if grid.per_tensor else None)
            scale, zero = (part[kept, kept].detach().clone() for part in (q.scale, q.zero))
            self.reach = max(grid.ends[1] - float(zero.mean()), 1.0)
            self.scale = nn.Parameter(scale)
            self.zero = nn.Parameter(zero, requires_grad=offset)

    def scales(self, weight: Float[Tensor, "rows columns"]) -> Scale:
        if self.scale is None or self.zero is None:
            return self.grid.scales_of(weight.detach().float())
        shape = (weight.shape[0], self.grid.groups(weight.shape[1]))
        return placed(self.scale, self.zero, self.grid).map(lambda part: part.expand(shape))

    def forward(self, weight: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        share = (
            1.0 if self.scale is None else gain(weight.numel() // self.scale.numel(), self.reach)
        )
        return self.formula.rows(weight, self.scales(weight), self.grid, share, self.training)

    @torch.no_grad()
    def coded(self, weight: Float[Tensor, "rows columns"]) -> Coded:
        return Coded.of(self.grid, weight, self.scales(weight))


class Frozen(FakeWeight):
    """Codes that stay as they are; their scales train."""

    codes: Tensor

    def __init__(self, start: Coded, offset: bool) -> None:
        super().__init__()
        self.start = start
        q = start.scales()
        self.register_buffer(
            "codes", start.codes.to(torch.uint8 if start.grid.bits <= 8 else torch.int32)
        )
        self.scale = nn.Parameter(q.scale.clone())
        self.zero = nn.Parameter(q.zero.clone(), requires_grad=offset)

    def scales(self, weight: Float[Tensor, "rows columns"]) -> Scale:
        grid = self.start.grid
        shape = (weight.shape[0], grid.groups(weight.shape[1]))
        return placed(self.scale, self.zero, grid).map(lambda part: part.expand(shape))

    def forward(self, weight: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        q = self.scales(weight).map(lambda part: part.reshape(-1, 1))
        codes = self.codes.reshape(q.scale.shape[0], -1).to(q.scale.dtype)
        return self.start.grid.decode(codes, q).reshape(weight.shape).to(weight.dtype)

    @torch.no_grad()
    def coded(self, weight: Float[Tensor, "rows columns"]) -> Coded:
        q = placed(self.scale, self.zero, self.start.grid)
        zero = q.zero if self.start.grid.has_zero else None
        return Coded(self.start.grid, self.codes.int(), q.scale, zero)


class ScaleRule(ABC):
    """Where the scales of weights come from while training."""

    offset: bool = False  # whether zero points train with them

    @abstractmethod
    def __call__(
        self, weight: Float[Tensor, "rows columns"], grid: Grid, formula: Formula
    ) -> FakeWeight: ...


@dataclass(frozen=True)
class Dynamic(ScaleRule):
    """Fitted to the weights by the grid's range at every step, and taken for constants."""

    def __call__(
        self, weight: Float[Tensor, "rows columns"], grid: Grid, formula: Formula
    ) -> FakeWeight:
        return Rounded(grid, formula, None, False)


@dataclass(frozen=True)
class Static(ScaleRule):
    """Fitted by the grid's range once, before training."""

    def __call__(
        self, weight: Float[Tensor, "rows columns"], grid: Grid, formula: Formula
    ) -> FakeWeight:
        _single(grid)
        made = Rounded(grid, formula, grid.scales_of(weight.detach().float()), False)
        return made.requires_grad_(False)


@dataclass(frozen=True)
class LSQ(ScaleRule):
    """Trained with the weights (1902.08153); with `offset` the zero points too (LSQ+, 2004.09576).

    init: `lsq`, 2 mean|w| / √q_p around a zero in the middle, or `range`, the grid's own fit.
    """

    init: str = "lsq"
    offset: bool = False

    def __post_init__(self) -> None:
        known(None, self, init=("lsq", "range"))
        switches(None, self, "offset")

    def __call__(
        self, weight: Float[Tensor, "rows columns"], grid: Grid, formula: Formula
    ) -> FakeWeight:
        _single(grid)
        q = grid.scales_of(weight.detach().float())
        if self.init == "lsq":
            zero = torch.full_like(q.zero, 2 ** (grid.bits - 1) if grid.ends[0] == 0 else 0)
            groups = weight.detach().float().abs().reshape(*q.scale.shape, -1)
            mean = groups.mean() if grid.per_tensor else groups.mean(-1)
            scale = 2 * mean / math.sqrt(max(grid.ends[1] - float(zero.mean()), 1.0))
            q = Scale(scale.expand_as(q.scale).clamp(min=torch.finfo(torch.float32).tiny), zero)
        return Rounded(grid, formula, q, self.offset and grid.has_zero)


@dataclass(frozen=True)
class FixedCodes(ScaleRule):
    """Codes of round-to-nearest that never change; scales that train, with `offset` zero points
    too (PEQA, 2305.14152; the second phase of EfficientQAT)."""

    offset: bool = False

    def __post_init__(self) -> None:
        switches(None, self, "offset")

    def __call__(
        self, weight: Float[Tensor, "rows columns"], grid: Grid, formula: Formula
    ) -> FakeWeight:
        _single(grid)
        weight = weight.detach().float()
        return Frozen(Coded.of(grid, weight, grid.scales_of(weight)), self.offset and grid.has_zero)


@dataclass(frozen=True)
class KnownCodes(ScaleRule):
    """Codes and first scales that another method found; scales and zero points that train."""

    start: Coded
    offset: bool = False

    def __call__(
        self, weight: Float[Tensor, "rows columns"], grid: Grid, formula: Formula
    ) -> FakeWeight:
        return Frozen(self.start, self.offset and grid.has_zero)


def suits(rule: ScaleRule, grid: Grid) -> None:
    """FieldError where zero points are to train that the grid has not."""
    if rule.offset and not grid.has_zero:
        raise FieldError(
            "scale.offset=true: a symmetric grid has no zero points to train; choose one that has "
            "(weight=int), or scale.offset=false."
        )


def _single(grid: Grid) -> None:
    if grid.second:
        raise UserError(
            "weight.scales, weight.zeros: scales that train are not quantized in turn; set them to "
            "null, or choose method/scale=dynamic."
        )


def fake(linear: nn.Linear) -> FakeWeight:
    """The parametrization that `put` made."""
    last = linear.parametrizations["weight"][-1]  # type: ignore[index]
    assert isinstance(last, FakeWeight)
    return last


def behind(linear: nn.Linear) -> Float[Tensor, "rows columns"]:
    """The weight before rounding."""
    chain: Any = linear.parametrizations["weight"]  # type: ignore[index]
    weight: Tensor = chain.original
    for inner in list(chain)[:-1]:
        weight = inner(weight)
    return weight


def put(linear: nn.Linear, rule: ScaleRule, grid: Grid, formula: Formula) -> None:
    """Round the weight of a linear whenever it is used."""
    made = rule(linear.weight, grid, formula).to(linear.weight.device)
    parametrize.register_parametrization(linear, "weight", made, unsafe=True)


@torch.no_grad()
def bake(linear: nn.Linear) -> Coded:
    """Make the weight plain again, with the values it had as it was used last, and what storage
    keeps of it."""
    packed = fake(linear).coded(behind(linear))
    parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)
    linear.weight.data = packed.dequantize().to(linear.weight)
    return packed
