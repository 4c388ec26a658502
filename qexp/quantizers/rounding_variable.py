"""Fake-quantized weights with a trained rounding variable each (SignRound, AdaRound, TesseraQ)."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qexp.grid import Grid, Scale
from qexp.packed.coded import Coded
from qexp.quantizers.fake_quantize import FakeQuantize, straight_through
from qexp.quantizers.weight import FakeWeight


class Shifted(FakeWeight):
    """Round W + s V to nearest, with V in steps of the grid (SignRound, 2309.05516, section 3).

    low, high: multipliers in [0, 1] of the ends that the range estimator gives each group of W. V
    starts at 0 and they at 1, which is round-to-nearest.
    """

    kinds: ClassVar = {"rounding": "rounding", "low": "ranges", "high": "ranges"}
    ends: Tensor  # [groups, 2]

    def __init__(
        self, grid: Grid, fake_quantize: FakeQuantize, weight: Float[Tensor, "rows columns"]
    ) -> None:
        super().__init__()
        self.grid, self.fake_quantize = grid, fake_quantize
        groups = len(weight) * grid.groups(weight.shape[1])
        fitted = grid.fit(weight.reshape(groups, -1)).fitted
        assert fitted is not None
        kept = slice(1 if grid.per_tensor else None)
        self.register_buffer("ends", torch.cat([end.float()[kept] for end in fitted], 1))
        self.low = nn.Parameter(torch.ones_like(self.ends[:, :1]))
        self.high = nn.Parameter(torch.ones_like(self.ends[:, :1]))
        self.rounding = nn.Parameter(torch.zeros_like(weight))

    def scales(self, weight: Float[Tensor, "rows columns"]) -> Scale:
        for part in (self.low, self.high):
            part.data.clamp_(0, 1)  # as the reference does: a clamp with gradient 0 would be a trap
        low, high = self.low * self.ends[:, :1], self.high * self.ends[:, 1:]
        q = self.grid.scale_for(low, high)
        if self.grid.has_zero:  # rounding a zero point does not stop its gradient
            q = q._replace(zero=straight_through(q.zero, -low / q.scale))
        shape = (weight.shape[0], self.grid.groups(weight.shape[1]))
        count = shape[0] * shape[1]
        return q.map(lambda part: part.expand(count, 1).reshape(shape))

    def unrounded(self, weight: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        return self._shifted(weight, self.scales(weight))

    def _shifted(
        self, weight: Float[Tensor, "rows columns"], q: Scale
    ) -> Float[Tensor, "rows columns"]:
        size = weight.shape[1] // q.scale.shape[1]
        return weight + self.rounding * q.scale.repeat_interleave(size, 1)

    def forward(self, weight: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        q = self.scales(weight)
        return self.fake_quantize.rows(
            self._shifted(weight, q), q, self.grid, training=self.training
        )

    def before_step(self, step: int, steps: int) -> None:
        self.fake_quantize = self.fake_quantize.at(step, steps)

    @torch.no_grad()
    def coded(self, weight: Float[Tensor, "rows columns"]) -> Coded:
        q = self.scales(weight)
        return Coded.of(self.grid, self._shifted(weight, q), q)


def share_up(v: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1), the rectified sigmoid of AdaRound (2004.10568,
    section 3.3): how far above the code below a weight lies, in steps."""
    return (1.2 * torch.sigmoid(v) - 0.1).clamp(0, 1)


class Soft(FakeWeight):
    """The code below plus h(V) in training, and its nearest code otherwise: above where V ≥ 0
    (AdaRound, 2004.10568, section 3.3). V starts where this is W itself.

    has_factor: scales are multiplied by 2 sigmoid(T), one T for each, which starts at 0; codes are
    those of the first scales. shares: of weights that may still be undecided in each of as many
    stages of equal length; at the begin of a stage the most decided others are fixed at their
    nearest code (TesseraQ, 2410.19103).
    """

    kinds: ClassVar = {"rounding": "rounding", "factor": "ranges"}
    scale: Tensor
    zero: Tensor

    def __init__(
        self,
        grid: Grid,
        weight: Float[Tensor, "rows columns"],
        has_factor: bool = False,
        shares: Sequence[float | int] = (),
    ) -> None:
        super().__init__()
        self.grid, self.shares, self.stage = grid, shares, -1
        q = grid.scales_of(weight)
        self.register_buffer("scale", q.scale)
        self.register_buffer("zero", q.zero)
        v, _ = self._position(weight)
        rest = (v - v.floor()).reshape(weight.shape)
        self.rounding = nn.Parameter(torch.logit((rest + 0.1) / 1.2))
        self.factor = None
        if has_factor:
            kept = slice(1 if grid.per_tensor else None)
            self.factor = nn.Parameter(torch.zeros_like(q.scale[kept, kept]))

    def scales(self, weight: Float[Tensor, "rows columns"]) -> Scale:
        if self.factor is None:
            return Scale(self.scale, self.zero)
        scale = self.scale * 2 * torch.sigmoid(self.factor)
        return Scale(straight_through(self.grid.as_stored(scale.detach()), scale), self.zero)

    def _position(self, weight: Float[Tensor, "rows columns"]) -> tuple[Tensor, Scale]:
        """Positions among the codes [groups, size], and the first scales of these groups."""
        q = Scale(self.scale, self.zero).map(lambda part: part.reshape(-1, 1))
        return self.grid.position(weight.reshape(len(q.scale), -1), q), q

    def unrounded(self, weight: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        v, _ = self._position(weight.detach())
        q = self.scales(weight).map(lambda part: part.reshape(-1, 1))
        codes = v.floor() + share_up(self.rounding).reshape(v.shape)
        return self.grid.decode(codes.clamp(0, self.grid.top), q).reshape(weight.shape)

    def forward(self, weight: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        soft = self.unrounded(weight)
        if self.training:
            return soft
        q = self.scales(weight).map(lambda part: part.reshape(-1, 1))
        return self.grid.round(soft.reshape(len(q.scale), -1), q).reshape(weight.shape)

    @torch.no_grad()
    def before_step(self, step: int, steps: int) -> None:
        stage = step * len(self.shares) // steps
        if self.shares and stage != self.stage:
            self.stage = stage
            self._decide(self.shares[stage])

    def _decide(self, undecided: float | int) -> None:
        """Fix all but the least decided share, by rounding variables that are infinite."""
        v = self.rounding.flatten()
        count = int(undecided * len(v))
        chosen = (share_up(v) - 0.5).abs().topk(count, largest=False).indices
        decided = torch.where(v < 0, -torch.inf, torch.inf)
        self.rounding.copy_(decided.index_copy(0, chosen, v[chosen]).reshape(self.rounding.shape))

    @torch.no_grad()
    def coded(self, weight: Float[Tensor, "rows columns"]) -> Coded:
        return Coded.of(self.grid, self.unrounded(weight), self.scales(weight))
