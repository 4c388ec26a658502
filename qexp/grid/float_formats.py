"""Grids of floating-point formats and of NormalFloat: unevenly spaced values."""

from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.common.errors import UserError, check_choice
from qexp.grid.base import Grid, Range
from qexp.grid.clipping import Clamp, Rounding, snap
from qexp.grid.integer import IntGrid
from qexp.grid.ranges import MinMax
from qexp.grid.scale import Scale
from qexp.grid.scale import positive as positive_scale

NORMAL = ("nf2", "nf3", "nf4")
KINDS = ("e4m3", "e5m2", "e2m1", *NORMAL)
TAILS = ("own", "nf4")
NEAR = 0.4999  # positions stay so close to the code that they round to


@cache
def levels(kind: str, tail: str = "own") -> tuple[float, ...]:
    """The sorted values of a named format, unscaled.

    eEmM: E exponent and M mantissa bits, with subnormals; e4m3 is the "fn" variant, whose top code
    is NaN, e5m2 the IEEE variant, whose top exponent is infinity and NaN. nfB: 0 and quantiles of
    the normal distribution, 2^(B-1) positive and one less negative, divided by the largest (QLoRA,
    2305.14314, section 3). tail: the offset of the outermost quantiles, of B bits (BitDistiller)
    or of 4 (LoftQ, LQ-LoRA).
    """
    if kind in NORMAL:
        bits = int(kind[2])
        codes = 2 ** (4 if tail == "nf4" else bits)
        outermost = round(1 - (1 / (codes - 1) + 1 / codes) / 4, 7)  # 0.9677083 as published
        counts = (2 ** (bits - 1) + 1, 2 ** (bits - 1))
        shares = (torch.linspace(outermost, 0.5, n, dtype=torch.float64)[:-1] for n in counts)
        positive, negative = map(torch.special.ndtri, shares)
        values = torch.cat([positive, -negative, torch.zeros(1, dtype=torch.float64)])
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


@dataclass(frozen=True)
class LevelGrid(Grid):
    """Unevenly spaced values of a named format (e4m3, e5m2, e2m1, nf2, nf3, nf4) times a scale per
    row.

    tail: of NormalFloat, see `levels`. scales: the grid of the scales of this grid (QLoRA's double
    quantization). signed_scales: negative levels have a scale of their own, min x / lowest level
    (BitDistiller, 2402.10631); it takes the place of a zero point.

    scale = max|x| / largest level. Ties round to the even mantissa, as floating-point casts do.

    Gradients: a value's `position` among the codes is rounded and clamped as on an integer grid, so
    surrogates see steps of one code. The width of a step divides on the way from values to codes
    and multiplies on the way back; both are left out, so dy/dx is the product of the two slopes.
    """

    kind: str = "nf4"
    group_size: int | None = None
    range: Range = MinMax()  # noqa: RUF009
    per_tensor: bool = False
    scale_dtype: str = "float32"
    tail: str = "own"
    signed_scales: bool = False
    scales: IntGrid | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(
                f"kind={self.kind} is not a known format: give one of {', '.join(KINDS)}."
            )
        check_choice("weight", self, tail=TAILS)
        if self.scales is not None and (self.per_tensor or self.signed_scales):
            raise UserError(
                "weight.scales needs weight.per_tensor=false weight.signed_scales=false."
            )
        if self.scales is not None and self.scales.axis != "outputs":
            raise UserError("weight.scales.axis=inputs: scales of levels have axis=outputs.")

    @property
    def bits(self) -> int:
        return (len(self.levels) - 1).bit_length()

    @property
    def levels(self) -> tuple[float, ...]:
        """The values, unscaled."""
        return levels(self.kind, self.tail)

    @property
    def top(self) -> int:
        return len(self.levels) - 1

    @property
    def bounds(self) -> tuple[float, float]:
        return self.levels[0], self.levels[-1]

    @property
    def has_zero(self) -> bool:
        return self.signed_scales

    @property
    def zero_bits(self) -> int:
        return torch.finfo(self.stored_dtype).bits if self.signed_scales else 0

    @property
    def second_level(self) -> dict[str, Grid]:
        return {} if self.scales is None else {"scales": self.scales}

    def scale_for(self, low: Float[Tensor, "rows 1"], high: Float[Tensor, "rows 1"]) -> Scale:
        if self.signed_scales:
            negative, positive = low.float().clamp(max=0), high.float().clamp(min=0)
            return Scale(self._unit(positive, -1), self._unit(negative, 0))
        max_abs = torch.maximum(low.abs(), high.abs()).float()
        if self.scales is None:
            scale = self._unit(max_abs, -1)
            return Scale(scale, torch.zeros_like(scale))
        scale = torch.where(max_abs == 0, 1.0, max_abs / self.levels[-1])
        stored = positive_scale(self.scales(scale.reshape(1, -1)).reshape(-1, 1))
        zero = torch.zeros_like(scale)
        return Scale(stored, zero, (scale, zero))

    def _unit(self, end: Float[Tensor, "rows 1"], level: int) -> Float[Tensor, "rows 1"]:
        """The stored scale with which this level lies at an end."""
        return self.as_stored(torch.where(end == 0, 1.0, end / self.levels[level]))

    def position(self, x: Float[Tensor, "*shape"], q: Scale) -> Float[Tensor, "*shape"]:
        if not self.signed_scales:
            return super().position(x, q)
        return self.code_position(x / torch.where(x < 0, q.zero, q.scale))

    def encode(
        self,
        x: Float[Tensor, "*shape"],
        q: Scale,
        rounding: Rounding = torch.round,
        clamp: Clamp = torch.clamp,
    ) -> Float[Tensor, "*shape"]:
        if rounding is torch.round and clamp is torch.clamp and not self.signed_scales:
            # the same codes, faster
            return torch.bucketize((x / q.scale).float(), self._edges(x.device)).to(x.dtype)
        return snap(self.position(x.float(), q), self.top, rounding, clamp).to(x.dtype)

    def decode(self, codes: Float[Tensor, "*shape"], q: Scale) -> Float[Tensor, "*shape"]:
        table = torch.tensor(self.levels, device=codes.device)
        level = table[codes.detach().nan_to_num().long()]
        scale = torch.where(level < 0, q.zero, q.scale) if self.signed_scales else q.scale
        return (level + (codes - codes.detach())).to(q.scale.dtype) * scale

    def code_position(self, v: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """k at level k and linear between two levels, beyond the ends as in the last step; rounds
        to the code of the nearest level, ties included. Its gradient is 1 per unit of v."""
        table, edges = torch.tensor(self.levels), self._edges(torch.device("cpu"))
        value, top = v.detach().float(), self.top
        # Half steps, from a level to an edge or from an edge to a level, and both sides beyond.
        bounds = torch.cat([torch.stack([table[:-1], edges], 1).flatten(), table[-1:]])
        near = (torch.arange(2 * top + 2) // 2).float()
        width = table.diff().repeat_interleave(2)
        width = torch.cat([width[:1], width, width[-1:]])
        low = torch.where(torch.arange(2 * top + 2) % 2 == 1, near, near - NEAR)
        high = torch.where(torch.arange(2 * top + 2) % 2 == 1, near + NEAR, near)
        low[0], high[-1] = -torch.inf, torch.inf
        low[-1] = torch.nextafter(near[-1], high[-1])  # a sum would round to the end itself
        step = torch.bucketize(value, bounds.to(v.device))
        near, level, width, low, high = (
            each.to(v.device)[step] for each in (near, table[near.long()], width, low, high)
        )
        at = (near + (value - level) / width).clamp(low, high)
        return at + (v - v.detach()).nan_to_num()  # an infinite value is clipped all the same

    def _edges(self, device: torch.device) -> Float[Tensor, " edges"]:
        """Midpoints between levels, lowered by one step of float32 where a tie rounds up."""
        table = torch.tensor(self.levels)
        middle = (table[1:] + table[:-1]) / 2
        # The distance from 0 in codes has the parity of the mantissa.
        away = (torch.arange(len(table)) - int((table == 0).nonzero())).abs()
        up = away[1:] % 2 == 0
        lowered = torch.nextafter(middle, torch.full_like(middle, -torch.inf))
        return torch.where(up, lowered, middle).to(device)
