"""Interfaces of grids and range estimators."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.common.errors import UserError
from qexp.grid.clipping import Clamp, Rounding, inside, reached
from qexp.grid.observers import HistogramObserver, Observer, RowHistogramObserver
from qexp.grid.scale import DTYPES, Scale, cut

Interval = tuple[Float[Tensor, "rows 1"], Float[Tensor, "rows 1"]]


class Range(ABC):
    @abstractmethod
    def __call__(
        self,
        x: Float[Tensor, "rows size"],
        grid: "Grid",
        counts: Float[Tensor, "rows size"] | None = None,
    ) -> Interval:
        """The interval (low, high) that the grid should cover, for each row."""

    def check(self, grid: "Grid") -> None:
        """UserError when the range does not fit the grid."""
        return None

    def observer(self, per_row: bool = False) -> Observer:
        """An observer for values that arrive one tensor at a time; of each row of matrices."""
        return RowHistogramObserver() if per_row else HistogramObserver()


class Grid(ABC):
    """A finite set of values per row of a matrix, given by a `Scale` (scale and zero point).

    The caller determines the granularity: `fit` gives each row of its argument one scale (all rows
    the same if `per_tensor`). `group_size` adjacent columns share a scale; None is the whole row.
    """

    group_size: int | None
    range: Range
    per_tensor: bool
    scale_dtype: str
    axis: str = "outputs"  # along which groups of a second level run

    @property
    @abstractmethod
    def bits(self) -> int:
        """Bits of a code as an integer."""

    @property
    def code_bits(self) -> float:
        """Stored bits per code."""
        return float(self.bits)

    @property
    def unstored_zero(self) -> float:
        """The zero point where none is stored."""
        return 0.0

    def with_bits(self, bits: int) -> "Grid":
        """The grid with codes of `bits` bits. UserError where their number is fixed."""
        raise UserError(
            f"method.options={bits}: the codes of {type(self).__name__} have {self.bits} bits; "
            "give weight=int."
        )

    @property
    def rowwise(self) -> bool:
        """Whether the values of a row depend only on that row."""
        return not (self.per_tensor or self.second_level) or self.fits_whole_rows

    @property
    def fits_whole_rows(self) -> bool:
        """Whether the second level runs along the inputs, so that all groups of a row have to be
        fitted together (`scales_of`)."""
        return any(grid.axis == "inputs" for grid in self.second_level.values())

    @property
    @abstractmethod
    def second_level(self) -> "dict[str, Grid]":
        """The grids of this grid's "scales" and "zeros", where those are quantized too."""

    @property
    @abstractmethod
    def top(self) -> int:
        """The highest code."""

    @property
    @abstractmethod
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest x / scale + zero that is not clipped."""

    @property
    @abstractmethod
    def has_zero(self) -> bool:
        """Whether a zero point must be stored with each scale."""

    def fit(
        self, x: Float[Tensor, "rows size"], counts: Float[Tensor, "rows size"] | None = None
    ) -> Scale:
        """The scale of each row. counts: how often each value occurs (histogram bins), or how
        much its error counts (importance)."""
        if self.per_tensor:
            x = x.reshape(1, -1)
            counts = None if counts is None else counts.reshape(1, -1)
        low, high = self.range(x, self, counts)
        return self.scale_for(low, high)._replace(fitted=(low.detach(), high.detach()))

    @abstractmethod
    def scale_for(self, low: Float[Tensor, "rows 1"], high: Float[Tensor, "rows 1"]) -> Scale:
        """The scale with which the grid covers `low` to `high`."""

    def position(self, x: Float[Tensor, "*shape"], q: Scale) -> Float[Tensor, "*shape"]:
        """The position of each value among the codes, before clamping to [0, top] and rounding.

        A value inside the interval of `q.fitted` that rounded zero points and scales put beyond an
        end, by at most one code, is moved to that end: its gradient is that of a value inside.
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
        """The code of each value, an integer in [0, 2^bits) in a floating-point tensor."""

    def code_position(self, v: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The position of v = x / scale + zero on the axis of codes."""
        return v

    @abstractmethod
    def decode(self, codes: Float[Tensor, "*shape"], q: Scale) -> Float[Tensor, "*shape"]:
        """The value of each code."""

    def round(
        self,
        x: Float[Tensor, "*shape"],
        q: Scale,
        rounding: Rounding = torch.round,
        clamp: Clamp = torch.clamp,
    ) -> Float[Tensor, "*shape"]:
        """Round to nearest and clamp to the bounds: the only quantization formula of the project.
        Training passes a `rounding` and a `clamp` with surrogate gradients."""
        return self.decode(self.encode(x, q, rounding, clamp), q)

    def clip(self, x: Float[Tensor, "*shape"], q: Scale) -> Float[Tensor, "*shape"]:
        """Values beyond the grid's bounds, moved to the bounds."""
        low, high = ((bound - q.zero) * q.scale for bound in self.bounds)
        return x.clamp(low, high)

    def check(self, rows: int, columns: int) -> None:
        """UserError when group sizes do not divide the sides of a [rows, columns] matrix, or the
        range does not fit the grid."""
        self.range.check(self)
        groups = self.groups(columns)
        for name, grid in self.second_level.items():
            by_row = grid.axis == "inputs"
            side, what = (groups, "groups of a row") if by_row else (rows, "outputs")
            cut(side, grid.group_size, f"weight.{name}.group_size", what)

    def groups(self, columns: int) -> int:
        """Number of groups in a row. Raises UserError when `group_size` does not divide it."""
        return cut(columns, self.group_size, "weight.group_size", "inputs")

    def cost(self, rows: int, columns: int) -> float:
        """Stored bits per weight of a [rows, columns] matrix, scales and zero points included."""
        groups = self.groups(columns)
        scales = 1 if self.per_tensor else rows * groups
        each = {"scales": float(torch.finfo(self.stored_dtype).bits), "zeros": self.zero_bits}
        for name, grid in self.second_level.items():
            along = (rows, groups) if grid.axis == "inputs" else (groups, rows)
            each[name] = grid.cost(*along)
        return self.code_bits + scales * sum(each.values()) / (rows * columns)

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype of scales, and of zero points that are not integers."""
        return DTYPES[self.scale_dtype]

    @property
    def zero_bits(self) -> int:
        """Stored bits per zero point."""
        return self.bits if self.has_zero else 0

    def scales_of(
        self,
        x: Float[Tensor, "rows columns"],
        counts: Float[Tensor, "rows columns"] | None = None,
    ) -> Scale:
        """Fit every group of a matrix; both of `Scale` are [rows, groups]. counts: as for `fit`."""
        rows, columns = x.shape
        groups = self.groups(columns)
        if self.second_level and not self.fits_whole_rows:
            # Their groups run along the rows of one group of columns.
            each = [None] * groups if counts is None else counts.chunk(groups, 1)
            parts = zip(x.chunk(groups, 1), each, strict=True)
            return Scale.join([self.fit(part, weight) for part, weight in parts])
        shape = rows * groups, columns // groups
        q = self.fit(x.reshape(shape), None if counts is None else counts.reshape(shape))
        q = q.map(lambda part: part.expand(rows * groups, 1).reshape(rows, groups))
        return self.along_rows(q, x, counts)

    def along_rows(
        self,
        q: Scale,
        x: Float[Tensor, "rows columns"],
        counts: Float[Tensor, "rows columns"] | None,
    ) -> Scale:
        """The scales [rows, groups] of a matrix after a second level along the inputs, if any."""
        return q

    def __call__(
        self, x: Float[Tensor, "rows columns"], rounding: Rounding = torch.round
    ) -> Float[Tensor, "rows columns"]:
        """Fit every group, and round to nearest."""
        q = self.scales_of(x).map(lambda part: part.reshape(-1, 1))
        return self.round(x.reshape(len(q.scale), -1), q, rounding).reshape(x.shape)

    def codes_of(
        self, x: Float[Tensor, "rows columns"], scales: Scale
    ) -> Float[Tensor, "rows columns"]:
        """The codes of a matrix, with the scales that `scales_of` fitted to it."""
        q = scales.map(lambda part: part.reshape(-1, 1))
        return self.encode(x.reshape(len(q.scale), -1), q).reshape(x.shape)

    def zero_as_stored(self, zero: Float[Tensor, "*rows each"]) -> Float[Tensor, "*rows each"]:
        """The zero point in its stored precision."""
        return zero

    def as_stored(self, scale: Float[Tensor, "*rows each"]) -> Float[Tensor, "*rows each"]:
        """The scale in its stored precision. Rounding must use it, or reloading changes values.

        A scale that would underflow becomes the smallest normal number. The gradient is 1: the
        backward pass of a cast would cast the gradient, which may overflow.
        """
        limits = torch.finfo(self.stored_dtype)
        stored = scale.detach().clamp(limits.smallest_normal, limits.max).to(self.stored_dtype)
        return stored.to(scale.dtype) + (scale - scale.detach())
