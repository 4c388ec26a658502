"""Grids of floating-point formats and of NormalFloat: unevenly spaced values."""

from dataclasses import dataclass, replace
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
from qexp.grid.uneven import UnevenGrid

NORMAL = ("nf2", "nf3", "nf4")
KINDS = ("e4m3", "e5m2", "e2m1", *NORMAL)
TAILS = ("own", "nf4")


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
class LevelGrid(UnevenGrid):
    """Unevenly spaced values of a named format (e4m3, e5m2, e2m1, nf2, nf3, nf4) times a scale per
    row.

    tail: of NormalFloat, see `levels`. scales: the grid of the scales of this grid (QLoRA's double
    quantization). signed_scales: negative levels have a scale of their own, min x / lowest level
    (BitDistiller, 2402.10631); it takes the place of a zero point.

    scale = max|x| / largest level. Ties round to the even mantissa, as floating-point casts do.
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

    def with_bits(self, bits: int) -> "LevelGrid":
        kind = f"nf{bits}"
        if self.kind not in NORMAL or kind not in NORMAL:
            raise UserError(
                f"method.options={bits}: {self.kind} has no form of {bits} bits; give options from "
                "2 to 4 with weight=nf2, nf3 or nf4, or weight=int."
            )
        return replace(self, kind=kind)

    @property
    def levels(self) -> tuple[float, ...]:
        """The values, unscaled."""
        return levels(self.kind, self.tail)

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
