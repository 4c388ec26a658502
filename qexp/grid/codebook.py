"""Grids whose values are a table that is fitted to activations (KVQuant's nuq)."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.common.errors import UserError
from qexp.grid.base import Grid, Range
from qexp.grid.clipping import Clamp, Rounding, snap
from qexp.grid.kmeans import kmeans
from qexp.grid.ranges import MinMax
from qexp.grid.scale import DTYPES, Scale
from qexp.grid.uneven import UnevenGrid


@dataclass(frozen=True)
class CodebookGrid(UnevenGrid):
    """middle + half · level: a table of 2^bits levels, which all rows share, on the interval of
    each row (nuq in KVQuant, 2401.18079). Middle and half width are kept per row.

    match_moments: the levels that codes stand for are shifted and stretched, so that mean and
    deviation of rounded values are those of the values (Q-Norm). Codes are unchanged by it.
    table, gain, offset: set by `fitted`; a value is middle + half · (gain · level + offset). An
    empty table is evenly spaced.
    """

    bits: int = 4
    group_size: int | None = None
    range: Range = MinMax()  # noqa: RUF009 (frozen: sharing the default is safe)
    per_tensor: bool = False
    scale_dtype: str = "float16"
    match_moments: bool = False
    table: tuple[float, ...] = ()
    gain: float = 1.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not 1 <= self.bits <= 8:
            raise UserError(f"bits={self.bits!r}: give a whole number from 1 to 8.")
        if self.scale_dtype not in DTYPES:
            raise UserError(
                f"scale_dtype={self.scale_dtype} is unknown: give {' or '.join(DTYPES)}."
            )

    @property
    def levels(self) -> tuple[float, ...]:
        return self.table or tuple(torch.linspace(-1, 1, 2**self.bits).tolist())

    @property
    def has_zero(self) -> bool:
        return True

    @property
    def zero_bits(self) -> int:
        return torch.finfo(self.stored_dtype).bits

    @property
    def second_level(self) -> dict[str, Grid]:
        return {}

    @property
    def state(self) -> Float[Tensor, " numbers"]:
        """What `fitted` sets: the levels, gain and offset."""
        return torch.tensor([*self.levels, self.gain, self.offset])

    def with_state(self, state: Float[Tensor, " numbers"]) -> "CodebookGrid":
        *table, gain, offset = state.tolist()
        return replace(self, table=tuple(table), gain=gain, offset=offset)

    def fitted(
        self,
        values: Float[Tensor, "1 bins"],
        mass: Float[Tensor, "1 bins"],
        counts: Float[Tensor, "1 bins"],
    ) -> "CodebookGrid":
        """The levels with a small Σ mass (v - level)² over positions v in [-1, 1].

        counts: how many values each position is of, for `match_moments`.
        """
        table = kmeans(values, mass, 2**self.bits).float()
        own = self.with_state(torch.cat([table[0], table.new_tensor([1.0, 0.0])]))
        if not self.match_moments:
            return own
        rounded = table[0][own._codes(values)]
        (mean, deviation), (other, spread) = (_moments(x, counts) for x in (values, rounded))
        gain = deviation / spread if spread > 0 else 1.0
        return own.with_state(torch.cat([table[0], torch.tensor([gain, mean - gain * other])]))

    def scale_for(self, low: Float[Tensor, "rows 1"], high: Float[Tensor, "rows 1"]) -> Scale:
        low, high = low.float(), high.float()
        middle, half = (low + high) / 2, (high - low) / 2
        # A zero point beyond its dtype would be infinite.
        half = torch.maximum(half, middle.abs() / torch.finfo(self.stored_dtype).max)
        scale = self.as_stored(half)
        return Scale(scale, self.zero_as_stored(-middle / scale))

    def zero_as_stored(self, zero: Float[Tensor, "*rows each"]) -> Float[Tensor, "*rows each"]:
        limit = torch.finfo(self.stored_dtype).max
        return zero.clamp(-limit, limit).to(self.stored_dtype).float()

    def encode(
        self,
        x: Float[Tensor, "*shape"],
        q: Scale,
        rounding: Rounding = torch.round,
        clamp: Clamp = torch.clamp,
    ) -> Float[Tensor, "*shape"]:
        if rounding is torch.round and clamp is torch.clamp:  # the same codes, faster
            return self._codes(x.float() / q.scale + q.zero).to(x.dtype)
        return snap(self.position(x.float(), q), self.top, rounding, clamp).to(x.dtype)

    def decode(self, codes: Float[Tensor, "*shape"], q: Scale) -> Float[Tensor, "*shape"]:
        table = torch.tensor(self.levels, device=codes.device) * self.gain + self.offset
        level = table[codes.detach().nan_to_num().long()]
        return (level + (codes - codes.detach()) - q.zero) * q.scale

    def _codes(self, v: Float[Tensor, "*shape"]) -> Tensor:
        return torch.bucketize(v.contiguous(), self._edges(v.device))


def _moments(x: Tensor, counts: Tensor) -> tuple[float, float]:
    """Mean and standard deviation."""
    share = counts.double() / counts.sum()
    mean = (share * x.double()).sum()
    return float(mean), float((share * (x.double() - mean).square()).sum().sqrt())
