"""Grids of floating-point formats and NF4: unevenly spaced values."""

from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.common.errors import UserError
from qexp.grid.base import Grid, Range
from qexp.grid.clipping import Clamp, Rounding, snap
from qexp.grid.ranges import MinMax
from qexp.grid.scale import Scale


@cache
def levels(kind: str) -> tuple[float, ...]:
    """The sorted values of a named format, unscaled.

    eEmM: E exponent and M mantissa bits, with subnormals; e4m3 is the "fn" variant, whose top code
    is NaN, e5m2 the IEEE variant, whose top exponent is infinity and NaN. nf4: 0 and quantiles of
    the normal distribution, 8 positive and 7 negative (QLoRA, section 3).
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
NEAR = 0.4999  # positions stay so close to the code that they round to


@dataclass(frozen=True)
class LevelGrid(Grid):
    """Unevenly spaced values of a named format (e4m3, e5m2, e2m1, nf4) times a scale per row.

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

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(
                f"kind={self.kind} is not a known format: give one of {', '.join(KINDS)}."
            )

    @property
    def bits(self) -> int:
        return 8 if self.kind in ("e4m3", "e5m2") else 4

    @property
    def top(self) -> int:
        return len(levels(self.kind)) - 1

    @property
    def bounds(self) -> tuple[float, float]:
        return levels(self.kind)[0], levels(self.kind)[-1]

    @property
    def has_zero(self) -> bool:
        return False

    @property
    def second_level(self) -> dict[str, Grid]:
        return {}

    def scale_for(self, low: Float[Tensor, "rows 1"], high: Float[Tensor, "rows 1"]) -> Scale:
        max_abs = torch.maximum(low.abs(), high.abs()).float()
        scale = self.as_stored(torch.where(max_abs == 0, 1.0, max_abs / levels(self.kind)[-1]))
        return Scale(scale, torch.zeros_like(scale))

    def encode(
        self,
        x: Float[Tensor, "*shape"],
        q: Scale,
        rounding: Rounding = torch.round,
        clamp: Clamp = torch.clamp,
    ) -> Float[Tensor, "*shape"]:
        if rounding is torch.round and clamp is torch.clamp:  # the same codes, faster
            return torch.bucketize((x / q.scale).float(), self._edges(x.device)).to(x.dtype)
        return snap(self.position(x.float(), q), self.top, rounding, clamp).to(x.dtype)

    def decode(self, codes: Float[Tensor, "*shape"], q: Scale) -> Float[Tensor, "*shape"]:
        table = torch.tensor(levels(self.kind), device=codes.device)
        level = table[codes.detach().nan_to_num().long()]
        return (level + (codes - codes.detach())).to(q.scale.dtype) * q.scale

    def code_position(self, v: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """k at level k and linear between two levels, beyond the ends as in the last step; rounds
        to the code of the nearest level, ties included. Its gradient is 1 per unit of v."""
        table, edges = torch.tensor(levels(self.kind)), self._edges(torch.device("cpu"))
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
        table = torch.tensor(levels(self.kind))
        middle = (table[1:] + table[:-1]) / 2
        # The distance from 0 in codes has the parity of the mantissa.
        away = (torch.arange(len(table)) - int((table == 0).nonzero())).abs()
        up = away[1:] % 2 == 0
        lowered = torch.nextafter(middle, torch.full_like(middle, -torch.inf))
        return torch.where(up, lowered, middle).to(device)
