"""The values a tensor may take, and what they cost to store.

A grid knows how to place itself over data (`fit`), how to name a value (`encode`), and what a name
stands for (`decode`). Everything in the project that rounds, rounds here.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.errors import UserError
from qexp.ranges import MinMax, Range

Rounding = Callable[[Tensor], Tensor]
Clamp = Callable[[Tensor, float, float], Tensor]


class Scale(NamedTuple):
    """Where a grid lies: value = scale · (code - zero)."""

    scale: Float[Tensor, "*rows 1"]
    zero: Float[Tensor, "*rows 1"]


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
        return not self.per_tensor

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

    def groups(self, columns: int) -> int:
        """How many groups a row of `columns` is cut into. Raises UserError when it cannot be."""
        if self.group_size is None:
            return 1
        if self.group_size < 1 or columns % self.group_size:
            raise UserError(
                f"weight.group_size={self.group_size} does not divide the {columns} inputs of a "
                f"layer: choose a divisor of {columns}, or null for one scale per row."
            )
        return columns // self.group_size

    def cost(self, rows: int, columns: int) -> float:
        """Bits per weight that storage of a [rows, columns] matrix takes, scales included."""
        scales = 1 if self.per_tensor else rows * self.groups(columns)
        each = torch.finfo(getattr(torch, self.scale_dtype)).bits + self.zero_bits
        return self.bits + scales * each / (rows * columns)

    @property
    def zero_bits(self) -> int:
        """Stored bits per zero point."""
        return self.bits if self.has_zero else 0

    def scales_of(self, x: Float[Tensor, "rows columns"]) -> Scale:
        """Fit every group of a matrix: scales and zeros [rows, groups]."""
        rows, columns = x.shape
        groups = self.groups(columns)
        q = self.fit(x.reshape(rows * groups, columns // groups))
        return Scale(*(part.expand(rows * groups, 1).reshape(rows, groups) for part in q))

    def __call__(self, x: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        """Round to nearest, group by group."""
        rows, columns = x.shape
        grouped = x.reshape(-1, columns // self.groups(columns))
        return self.round(grouped, self.fit(grouped)).reshape(rows, columns)

    def _stored(self, scale: Float[Tensor, "rows 1"]) -> Float[Tensor, "rows 1"]:
        """The scale as storage keeps it; rounding must use that one, or reloading changes values.

        A scale that underflows to zero there becomes the smallest that does not.
        """
        dtype = getattr(torch, self.scale_dtype)
        tiny = torch.finfo(dtype).smallest_normal
        return scale.clamp(tiny, torch.finfo(dtype).max).to(dtype).to(scale.dtype)


@dataclass(frozen=True)
class IntGrid(Grid):
    """Evenly spaced values: scale · (code - zero), code in 0 … 2^bits - 1.

    symmetric: full signed range of the GPTQ reference, scale = 2·max|x| / (2^bits - 1) and
    zero = 2^(bits-1). Asymmetric: scale = (max - min) / (2^bits - 1), zero = round(-min / scale).
    include_zero: asymmetric ranges are widened to hold 0 (GPTQ does, SpQR does not).
    real_zero: zero points are not rounded (SpQR's default).
    scales, zeros: a grid for the scales or zeros of this one, along the rows (SpQR's second level).
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
            raise UserError(f"bits={self.bits!r} is not an integer grid: give 2 to 16 bits.")
        if self.scale_dtype not in ("float32", "float16", "bfloat16"):
            raise UserError(
                f"scale_dtype={self.scale_dtype} is unknown: give float32, float16 or bfloat16."
            )

    @property
    def top(self) -> int:
        """The highest code."""
        return 2**self.bits - 1

    @property
    def has_zero(self) -> bool:
        return not self.symmetric

    @property
    def zero_bits(self) -> int:
        if self.symmetric:
            return 0
        return torch.finfo(getattr(torch, self.scale_dtype)).bits if self.real_zero else self.bits

    def span(self, low: Float[Tensor, "rows 1"], high: Float[Tensor, "rows 1"]) -> Scale:
        low, high = low.float(), high.float()
        if self.symmetric:
            high = torch.maximum(low.abs(), high.abs())
            low = -high
        elif self.include_zero:
            low, high = low.clamp(max=0), high.clamp(min=0)
        # A row of one value has no width: widen to 0, and for a row of zeros to [-1, 1] (GPTQ).
        constant = low == high
        low, high = (
            torch.where(constant, low.clamp(max=0), low),
            torch.where(constant, high.clamp(min=0), high),
        )
        low, high = torch.where(low == high, -1.0, low), torch.where(low == high, 1.0, high)
        scale = self._stored((high - low) / self.top)
        if self.scales is not None:
            scale = self._second(self.scales, scale).clamp(min=torch.finfo(torch.float32).tiny)
        if self.symmetric:
            return Scale(scale, torch.full_like(scale, 2 ** (self.bits - 1)))
        zero = -low / scale
        zero = self._real(zero) if self.real_zero else zero.round().clamp(0, self.top)
        if self.zeros is not None:
            zero = self._second(self.zeros, zero)
        return Scale(scale, zero)

    def _real(self, zero: Float[Tensor, "rows 1"]) -> Float[Tensor, "rows 1"]:
        return zero.to(getattr(torch, self.scale_dtype)).float()

    @staticmethod
    def _second(grid: "IntGrid", column: Float[Tensor, "rows 1"]) -> Float[Tensor, "rows 1"]:
        return grid(column.reshape(1, -1)).reshape(-1, 1)

    def encode(
        self,
        x: Float[Tensor, "*shape"],
        q: Scale,
        rounding: Rounding = torch.round,
        clamp: Clamp = torch.clamp,
    ) -> Float[Tensor, "*shape"]:
        return rounding(clamp(x / q.scale + q.zero, 0, self.top))

    def decode(self, codes: Float[Tensor, "*shape"], q: Scale) -> Float[Tensor, "*shape"]:
        return (codes - q.zero) * q.scale


@cache
def levels(kind: str) -> tuple[float, ...]:
    """The sorted values of a named format, unscaled.

    eEmM: E exponent and M mantissa bits with subnormals; e4m3 is the "fn" variant whose top code
    is NaN, e5m2 the IEEE one whose top exponent is infinity. nf4: quantiles of the normal
    distribution, 8 positive and 7 negative beside 0 (QLoRA, section 3).
    """
    if kind == "nf4":
        tail = 0.9677083  # mean of 1 - 1/(2·15) and 1 - 1/(2·16), QLoRA's offset
        positive = torch.special.ndtri(torch.linspace(tail, 0.5, 9, dtype=torch.float64)[:-1])
        negative = -torch.special.ndtri(torch.linspace(tail, 0.5, 8, dtype=torch.float64)[:-1])
        values = torch.cat([positive, negative, torch.zeros(1, dtype=torch.float64)])
        return tuple((values / values.max()).sort().values.tolist())
    exponent, mantissa = int(kind[1]), int(kind[3])
    bias = 2 ** (exponent - 1) - 1
    last = {"e4m3": 2**7 - 1, "e5m2": 31 << 2}.get(kind, 2 ** (exponent + mantissa))
    values_ = []
    for code in range(last):
        e, m = divmod(code, 2**mantissa)
        fraction = m / 2**mantissa
        values_.append(
            2.0 ** (1 - bias) * fraction if e == 0 else 2.0 ** (e - bias) * (1 + fraction)
        )
    return tuple(sorted({-v for v in values_} | set(values_)))


KINDS = ("e4m3", "e5m2", "e2m1", "nf4")


@dataclass(frozen=True)
class LevelGrid(Grid):
    """Unevenly spaced values of a named format (e4m3, e5m2, e2m1, nf4) times a scale per row.

    scale = max|x| / largest level. Ties round to the even mantissa, as floating-point casts do.
    """

    kind: str = "nf4"
    group_size: int | None = None
    range: Range = MinMax()  # noqa: RUF009
    per_tensor: bool = False
    scale_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(
                f"kind={self.kind} is not a known format: give one of {', '.join(KINDS)}."
            )

    @property
    def bits(self) -> int:
        return 8 if self.kind in ("e4m3", "e5m2") else 4

    @property
    def has_zero(self) -> bool:
        return False

    def span(self, low: Float[Tensor, "rows 1"], high: Float[Tensor, "rows 1"]) -> Scale:
        reach = torch.maximum(low.abs(), high.abs()).float()
        scale = self._stored(torch.where(reach == 0, 1.0, reach / levels(self.kind)[-1]))
        return Scale(scale, torch.zeros_like(scale))

    def encode(
        self,
        x: Float[Tensor, "*shape"],
        q: Scale,
        rounding: Rounding = torch.round,
        clamp: Clamp = torch.clamp,
    ) -> Float[Tensor, "*shape"]:
        return torch.bucketize((x / q.scale).float(), self._edges(x.device)).to(x.dtype)

    def decode(self, codes: Float[Tensor, "*shape"], q: Scale) -> Float[Tensor, "*shape"]:
        table = torch.tensor(levels(self.kind), device=codes.device)
        return table[codes.long()].to(q.scale.dtype) * q.scale

    def _edges(self, device: torch.device) -> Float[Tensor, " edges"]:
        """Midpoints between levels, lowered by one step of float32 where a tie goes up."""
        table = torch.tensor(levels(self.kind))
        middle = (table[1:] + table[:-1]) / 2
        # Distance in codes from 0 has the parity of the mantissa.
        away = (torch.arange(len(table)) - int((table == 0).nonzero())).abs()
        up = away[1:] % 2 == 0
        lowered = torch.nextafter(middle, torch.full_like(middle, -torch.inf))
        return torch.where(up, lowered, middle).to(device)
