"""Interfaces: the grid, and the range estimator that places it."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.grid.clipping import Clamp, Rounding, inside, reached
from qexp.grid.observers import HistogramObserver, Observer
from qexp.grid.scale import Scale, cut

Interval = tuple[Float[Tensor, "rows 1"], Float[Tensor, "rows 1"]]


class Range(ABC):
    @abstractmethod
    def __call__(
        self,
        x: Float[Tensor, "rows size"],
        grid: "Grid",
        counts: Float[Tensor, "rows size"] | None = None,
    ) -> Interval:
        """The lowest and the highest value of each row that the grid should reach."""

    def observer(self) -> Observer:
        """What has to be gathered of values that come one tensor at a time."""
        return HistogramObserver()


class Grid(ABC):
    """A finite set of values per row of a matrix, placed by a `Scale`.

    Granularity is the caller's cut: `fit` gives each row of its argument one scale (one for all of
    them when `per_tensor`). `group_size` neighbouring columns share a scale; None is the whole row.
    """

    group_size: int | None
    range: Range
    per_tensor: bool
    scale_dtype: str

    @property
    @abstractmethod
    def bits(self) -> int:
        """Stored bits per code."""

    @property
    def rowwise(self) -> bool:
        """Whether the values of a row depend on that row alone."""
        return not (self.per_tensor or self.second_level)

    @property
    @abstractmethod
    def second_level(self) -> "dict[str, Grid]":
        """The grids of its own "scales" and "zeros", where they are quantized in turn."""

    @property
    @abstractmethod
    def top(self) -> int:
        """The highest code."""

    @property
    @abstractmethod
    def bounds(self) -> tuple[float, float]:
        """The least and the greatest x / scale + zero that is not clipped."""

    @property
    @abstractmethod
    def has_zero(self) -> bool:
        """Whether a zero point must be stored beside each scale."""

    def fit(
        self, x: Float[Tensor, "rows size"], counts: Float[Tensor, "rows size"] | None = None
    ) -> Scale:
        """The scale of each row; `counts` says how often each value occurs (histogram bins)."""
        if self.per_tensor:
            x = x.reshape(1, -1)
            counts = None if counts is None else counts.reshape(1, -1)
        low, high = self.range(x, self, counts)
        return self.scale_for(low, high)._replace(fitted=(low.detach(), high.detach()))

    @abstractmethod
    def scale_for(self, low: Float[Tensor, "rows 1"], high: Float[Tensor, "rows 1"]) -> Scale:
        """The scale with which the grid reaches from `low` to `high`."""

    def position(self, x: Float[Tensor, "*shape"], q: Scale) -> Float[Tensor, "*shape"]:
        """The position of each value among the codes, before clamping to [0, top] and rounding.

        A value inside the interval of `q.fitted` that lies beyond an end by at most one code, which
        the rounding of zero points and scales causes, is moved to that end: it is not clipped, and
        its gradient is that of a value inside.
        """
        v = self.code_position(x / q.scale + q.zero)
        if q.fitted is None:
            return v
        near = inside(v.detach(), -1, self.top + 1)
        return reached(v, inside(x.detach(), *q.fitted).mul_(near), 0, self.top)

    @abstractmethod
    def encode(
        self,
        x: Float[Tensor, "*shape"],
        q: Scale,
        rounding: Rounding = torch.round,
        clamp: Clamp = torch.clamp,
    ) -> Float[Tensor, "*shape"]:
        """The code of each value, a whole number in [0, 2^bits) kept in floating point."""

    def code_position(self, v: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The position of v = x / scale + zero on the axis of codes."""
        return v

    @abstractmethod
    def decode(self, codes: Float[Tensor, "*shape"], q: Scale) -> Float[Tensor, "*shape"]:
        """The value that each code stands for."""

    def round(
        self,
        x: Float[Tensor, "*shape"],
        q: Scale,
        rounding: Rounding = torch.round,
        clamp: Clamp = torch.clamp,
    ) -> Float[Tensor, "*shape"]:
        """Round to nearest, clamp to the ends. The one quantization formula of the project:
        training hands in other gradients for `rounding` and `clamp`."""
        return self.decode(self.encode(x, q, rounding, clamp), q)

    def check(self, rows: int, columns: int) -> None:
        """UserError when a [rows, columns] matrix cannot be cut as the settings say."""
        self.groups(columns)
        for name, grid in self.second_level.items():
            cut(rows, grid.group_size, f"weight.{name}.group_size", "outputs")

    def groups(self, columns: int) -> int:
        """How many groups a row of `columns` is cut into. Raises UserError when it cannot be."""
        return cut(columns, self.group_size, "weight.group_size", "inputs")

    def cost(self, rows: int, columns: int) -> float:
        """Bits per weight that storage of a [rows, columns] matrix takes, scales included."""
        groups = self.groups(columns)
        scales = 1 if self.per_tensor else rows * groups
        each = {"scales": float(torch.finfo(self.stored_dtype).bits), "zeros": self.zero_bits}
        each |= {name: grid.cost(groups, rows) for name, grid in self.second_level.items()}
        return self.bits + scales * sum(each.values()) / (rows * columns)

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of scales, and of zero points that are not whole."""
        dtype: torch.dtype = getattr(torch, self.scale_dtype)
        return dtype

    @property
    def zero_bits(self) -> int:
        """Stored bits per zero point."""
        return self.bits if self.has_zero else 0

    def scales_of(self, x: Float[Tensor, "rows columns"]) -> Scale:
        """Fit every group of a matrix: scales and zeros [rows, groups]."""
        rows, columns = x.shape
        groups = self.groups(columns)
        if self.second_level:  # their groups run along the rows of one group of columns
            return Scale.join([self.fit(part) for part in x.chunk(groups, 1)])
        q = self.fit(x.reshape(rows * groups, columns // groups))
        return q.map(lambda part: part.expand(rows * groups, 1).reshape(rows, groups))

    def __call__(
        self, x: Float[Tensor, "rows columns"], rounding: Rounding = torch.round
    ) -> Float[Tensor, "rows columns"]:
        """Round to nearest, group by group."""
        q = self.scales_of(x).map(lambda part: part.reshape(-1, 1))
        return self.round(x.reshape(len(q.scale), -1), q, rounding).reshape(x.shape)

    def as_stored(self, scale: Float[Tensor, "*rows each"]) -> Float[Tensor, "*rows each"]:
        """The scale as storage keeps it; rounding must use that one, or reloading changes values.

        A scale that underflows to zero there becomes the smallest that does not. Gradients pass
        straight through: a cast would cast them too, and overflow."""
        limits = torch.finfo(self.stored_dtype)
        kept = scale.detach().clamp(limits.smallest_normal, limits.max).to(self.stored_dtype)
        return kept.to(scale.dtype) + (scale - scale.detach())
