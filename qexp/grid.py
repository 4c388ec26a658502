"""The values a tensor may take, and what they cost to store.

A grid knows how to place itself over data (`fit`), how to name a value (`encode`), and what a name
stands for (`decode`). Everything in the project that rounds, rounds here.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.clipping import Clamp, Rounding, snap
from qexp.errors import UserError
from qexp.ranges import MinMax, Range
from qexp.scale import DTYPES, cut, positive
from qexp.scale import Scale as Scale


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
        return not (self.per_tensor or self.second)

    @property
    @abstractmethod
    def second(self) -> "dict[str, Grid]":
        """The grids of its own "scales" and "zeros", where they are quantized in turn."""

    @property
    @abstractmethod
    def ends(self) -> tuple[float, float]:
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
        return self.span(*self.range(x, self, counts))

    @abstractmethod
    def span(self, low: Float[Tensor, "rows 1"], high: Float[Tensor, "rows 1"]) -> Scale:
        """The scale with which the grid reaches from `low` to `high`."""

    @abstractmethod
    def encode(
        self,
        x: Float[Tensor, "*shape"],
        q: Scale,
        rounding: Rounding = torch.round,
        clamp: Clamp = torch.clamp,
    ) -> Float[Tensor, "*shape"]:
        """The code of each value, a whole number in [0, 2^bits) kept in floating point."""

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
        for name, grid in self.second.items():
            cut(rows, grid.group_size, f"weight.{name}.group_size", "outputs")

    def groups(self, columns: int) -> int:
        """How many groups a row of `columns` is cut into. Raises UserError when it cannot be."""
        return cut(columns, self.group_size, "weight.group_size", "inputs")

    def cost(self, rows: int, columns: int) -> float:
        """Bits per weight that storage of a [rows, columns] matrix takes, scales included."""
        groups = self.groups(columns)
        scales = 1 if self.per_tensor else rows * groups
        each = {"scales": float(torch.finfo(self.stored_dtype).bits), "zeros": self.zero_bits}
        each |= {name: grid.cost(groups, rows) for name, grid in self.second.items()}
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
        if self.second:  # their groups run along the rows of one group of columns
            return Scale.join([self.fit(part) for part in x.chunk(groups, 1)])
        q = self.fit(x.reshape(rows * groups, columns // groups))
        return q.map(lambda part: part.expand(rows * groups, 1).reshape(rows, groups))

    def __call__(
        self, x: Float[Tensor, "rows columns"], rounding: Rounding = torch.round
    ) -> Float[Tensor, "rows columns"]:
        """Round to nearest, group by group."""
        q = self.scales_of(x).map(lambda part: part.reshape(-1, 1))
        return self.round(x.reshape(len(q.scale), -1), q, rounding).reshape(x.shape)

    def stored(self, scale: Float[Tensor, "*rows each"]) -> Float[Tensor, "*rows each"]:
        """The scale as storage keeps it; rounding must use that one, or reloading changes values.

        A scale that underflows to zero there becomes the smallest that does not. Gradients pass
        straight through: a cast would cast them too, and overflow."""
        limits = torch.finfo(self.stored_dtype)
        kept = scale.detach().clamp(limits.smallest_normal, limits.max).to(self.stored_dtype)
        return kept.to(scale.dtype) + (scale - scale.detach())


@dataclass(frozen=True)
class IntGrid(Grid):
    """Evenly spaced values: scale · (code - zero), code in 0 … 2^bits - 1.

    symmetric: full signed range of the GPTQ reference, scale = 2·max|x| / (2^bits - 1) and
    zero = 2^(bits-1). Asymmetric: scale = (max - min) / (2^bits - 1), zero = round(-min / scale).
    include_zero: asymmetric ranges are widened to hold 0 (GPTQ does, SpQR does not).
    real_zero: zero points are not rounded (SpQR's default).
    scales, zeros: a grid for the scales or zeros of this one, whose groups are runs of rows within
    one group of columns (SpQR's second level).
    """

    bits: int = 4
    symmetric: bool = False
    group_size: int | None = None
    range: Range = MinMax()  # noqa: RUF009 (frozen, so sharing the default is safe)
    per_tensor: bool = False
    scale_dtype: str = "float32"
    include_zero: bool = True
    real_zero: bool = False
    scales: "IntGrid | None" = None
    zeros: "IntGrid | None" = None

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not 2 <= self.bits <= 16:
            raise UserError(f"bits={self.bits!r}: give a whole number from 2 to 16.")
        if self.scale_dtype not in DTYPES:
            raise UserError(
                f"scale_dtype={self.scale_dtype} is unknown: give {' or '.join(DTYPES)}."
            )
        if self.per_tensor and self.second:
            raise UserError("weight.scales, weight.zeros need weight.per_tensor=false.")
        if self.per_tensor and self.group_size is not None:
            raise UserError(
                f"per_tensor=true with group_size={self.group_size}: one scale for all leaves "
                "no groups; give null (weight.per_tensor=true needs weight.group_size=null)."
            )

    @property
    def second(self) -> dict[str, Grid]:
        named = {"scales": self.scales, "zeros": None if self.symmetric else self.zeros}
        return {name: grid for name, grid in named.items() if grid is not None}

    @property
    def top(self) -> int:
        """The highest code."""
        return 2**self.bits - 1

    @property
    def ends(self) -> tuple[float, float]:
        return 0.0, float(self.top)

    @property
    def has_zero(self) -> bool:
        return not self.symmetric

    @property
    def zero_bits(self) -> int:
        if self.symmetric:
            return 0
        return torch.finfo(self.stored_dtype).bits if self.real_zero else self.bits

    def span(self, low: Float[Tensor, "rows 1"], high: Float[Tensor, "rows 1"]) -> Scale:
        low, high = low.float(), high.float()
        if self.symmetric:
            high = torch.maximum(low.abs(), high.abs())
            low = -high
        elif self.include_zero:
            low, high = low.clamp(max=0), high.clamp(min=0)
        # A row of one value has no width: widen to 0, and for a row of zeros to [0, 1].
        constant = low == high
        low = torch.where(constant, low.clamp(max=0), low)
        high = torch.where(constant, high.clamp(min=0), high)
        high = torch.where(low == high, 1.0, high)
        width = (high - low) / self.top
        if self.real_zero:  # a zero point beyond its dtype would be infinite
            width = torch.maximum(width, low.abs() / torch.finfo(self.stored_dtype).max)
        scale = width if self.scales is not None else self.stored(width)
        if self.symmetric:
            zero = torch.full_like(scale, 2 ** (self.bits - 1))
        elif self.real_zero:
            zero = -low / scale
            zero = zero if self.zeros is not None else zero.to(self.stored_dtype).float()
        else:
            zero = (-low / scale).round().clamp(0, self.top)
        if not self.second:
            return Scale(scale, zero)
        # As in SpQR, zeros come from the scale before its own rounding.
        raw = {"scales": scale, "zeros": zero}
        coded = raw | {n: g(raw[n].reshape(1, -1)).reshape(-1, 1) for n, g in self.second.items()}
        return Scale(positive(coded["scales"]), coded["zeros"], (scale, zero))

    def encode(
        self,
        x: Float[Tensor, "*shape"],
        q: Scale,
        rounding: Rounding = torch.round,
        clamp: Clamp = torch.clamp,
    ) -> Float[Tensor, "*shape"]:
        return snap(x / q.scale + q.zero, self.top, rounding, clamp)

    def decode(self, codes: Float[Tensor, "*shape"], q: Scale) -> Float[Tensor, "*shape"]:
        return (codes - q.zero) * q.scale
