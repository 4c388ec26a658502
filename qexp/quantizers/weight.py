"""Fake-quantized weights: rounded in the forward pass while the float weights behind them train."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from qexp.grid import Grid, Scale
from qexp.packed.base import Packed
from qexp.packed.coded import Coded
from qexp.packed.outliers import Outliers
from qexp.quantizers.fake_quantize import (
    FakeQuantize,
    as_stored,
    lsq_gradient_scale,
    straight_through,
)

# Codes that a residual may be away from its code: less than a half, which would round to the next.
EDGE = 0.499


class FakeWeight(nn.Module, ABC):
    """Parametrization of `Linear.weight` that puts the float weight on a grid.

    kinds: of its parameters, the names that optimizers know them by. has_fixed_codes: training
    changes no code. is_constant: nor anything else.
    """

    kinds: ClassVar[Mapping[str, str]] = {"scale": "scales", "zero": "offsets"}
    has_fixed_codes = False
    is_constant = False
    grid: Grid

    @abstractmethod
    def forward(self, weight: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]: ...

    @abstractmethod
    def scales(self, weight: Float[Tensor, "rows columns"]) -> Scale:
        """Scales and zero points [rows, groups], as storage would keep them."""

    @abstractmethod
    def coded(self, weight: Float[Tensor, "rows columns"]) -> Packed:
        """The stored form; its values are those of `forward` in evaluation, bit for bit."""

    def unrounded(self, weight: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        """The matrix whose nearest codes are stored: the weight, moved by rounding variables."""
        return weight

    def before_step(self, step: int, steps: int) -> None:
        """Called before each step of the optimizer, counted from 0, of `steps`."""

    def after_step(self) -> None:
        """Called after each step of the optimizer."""


class Rounded(FakeWeight):
    """Round to nearest, with scales that are fitted at every forward pass or trained."""

    def __init__(
        self, grid: Grid, fake_quantize: FakeQuantize, q: Scale | None, offset: bool
    ) -> None:
        super().__init__()
        self.grid, self.fake_quantize = grid, fake_quantize
        self.scale = self.zero = None
        self.highest_code = 1.0
        if q is not None:
            kept = slice(1 if grid.per_tensor else None)
            scale, zero = (part[kept, kept].detach().clone() for part in (q.scale, q.zero))
            self.highest_code = max(grid.bounds[1] - float(zero.mean()), 1.0)
            self.scale = nn.Parameter(scale)
            self.zero = nn.Parameter(zero, requires_grad=offset)

    def scales(self, weight: Float[Tensor, "rows columns"]) -> Scale:
        if self.scale is None or self.zero is None:
            return self.grid.scales_of(weight.detach().float())
        shape = (weight.shape[0], self.grid.groups(weight.shape[1]))
        return as_stored(self.scale, self.zero, self.grid).map(lambda part: part.expand(shape))

    def forward(self, weight: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        share = (
            1.0
            if self.scale is None
            else lsq_gradient_scale(weight.numel() // self.scale.numel(), self.highest_code)
        )
        return self.fake_quantize.rows(weight, self.scales(weight), self.grid, share, self.training)

    def before_step(self, step: int, steps: int) -> None:
        self.fake_quantize = self.fake_quantize.at(step, steps)

    @torch.no_grad()
    def coded(self, weight: Float[Tensor, "rows columns"]) -> Coded:
        return Coded.of(self.grid, weight, self.scales(weight))


class Frozen(FakeWeight):
    """Constant codes; their scales train."""

    has_fixed_codes = True
    codes: Tensor

    def __init__(self, start: Coded, offset: bool) -> None:
        super().__init__()
        self.start, self.grid = start, start.grid
        q = start.scales()
        self.register_buffer(
            "codes", start.codes.to(torch.uint8 if start.grid.bits <= 8 else torch.int32)
        )
        self.scale = nn.Parameter(q.scale.clone())
        self.zero = nn.Parameter(q.zero.clone(), requires_grad=offset)

    def scales(self, weight: Float[Tensor, "rows columns"]) -> Scale:
        grid = self.start.grid
        shape = (weight.shape[0], grid.groups(weight.shape[1]))
        return as_stored(self.scale, self.zero, grid).map(lambda part: part.expand(shape))

    def forward(self, weight: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        q = self.scales(weight).map(lambda part: part.reshape(-1, 1))
        codes = self.codes.reshape(q.scale.shape[0], -1).to(q.scale.dtype)
        return self.start.grid.decode(codes, q).reshape(weight.shape).to(weight.dtype)

    @torch.no_grad()
    def coded(self, weight: Float[Tensor, "rows columns"]) -> Coded:
        q = as_stored(self.scale, self.zero, self.start.grid)
        zero = q.zero if self.start.grid.has_zero else None
        return Coded(self.start.grid, self.codes.int(), q.scale, zero)


class ConstantWeight(FakeWeight):
    """A stored form of which nothing changes."""

    kinds: ClassVar[Mapping[str, str]] = {}
    has_fixed_codes = is_constant = True
    values: Tensor

    def __init__(self, start: Packed) -> None:
        super().__init__()
        self.start = start
        self.register_buffer("values", start.dequantize(), persistent=False)

    def scales(self, weight: Float[Tensor, "rows columns"]) -> Scale:
        assert isinstance(self.start, Coded)
        return self.start.scales()

    def forward(self, weight: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        return self.values.to(weight.dtype)

    def coded(self, weight: Float[Tensor, "rows columns"]) -> Packed:
        return self.start


class FloatOutliers(FakeWeight):
    """Constant codes, except for outliers, which train in the dtype of their storage."""

    kinds: ClassVar[Mapping[str, str]] = {"values": "weights"}
    has_fixed_codes = is_constant = True
    rest: Tensor
    mask: Tensor

    def __init__(
        self,
        start: Coded,
        weight: Float[Tensor, "rows columns"],
        mask: Bool[Tensor, "rows columns"],
        dtype: str,
    ) -> None:
        super().__init__()
        self.start, self.dtype = start, dtype
        self.register_buffer("rest", start.dequantize(), persistent=False)
        self.register_buffer("mask", mask, persistent=False)
        self.values = nn.Parameter(weight[mask].float())

    def scales(self, weight: Float[Tensor, "rows columns"]) -> Scale:
        return self.start.scales()

    def forward(self, weight: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        stored = self.values.detach().to(getattr(torch, self.dtype)).to(self.values)
        values = straight_through(stored, self.values)
        return self.rest.masked_scatter(self.mask, values).to(weight.dtype)

    @torch.no_grad()
    def coded(self, weight: Float[Tensor, "rows columns"]) -> Coded:
        if not len(self.values):
            return self.start
        filled = self.rest.masked_scatter(self.mask, self.values)
        return replace(self.start, outliers=Outliers.of(filled, self.mask, self.dtype))


class Moving(FakeWeight):
    """Scales that train, and codes of which a share changes after each step (2405.14852, V step).

    A parameter holds the position of each weight in codes: the code itself during a forward pass,
    whose gradient is that of the code, and where the optimizer wants it after a step. Of each
    matrix the `share` of weights that are to go farthest then take the nearest code. The others
    keep theirs.

    keep: share of the distance to the code that is left as a residual for the next step, no farther
    than to the middle between two codes.
    """

    kinds: ClassVar[Mapping[str, str]] = {"codes": "codes"}

    def __init__(self, start: Coded, offset: bool, share: float, keep: float) -> None:
        super().__init__()
        self.grid, self.inner = start.grid, Frozen(start, offset)
        self.share, self.keep = share, keep
        self.codes = nn.Parameter(start.codes.float())

    def scales(self, weight: Float[Tensor, "rows columns"]) -> Scale:
        return self.inner.scales(weight)

    def forward(self, weight: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        q = self.scales(weight).map(lambda part: part.reshape(-1, 1))
        moved = self.codes - self.codes.detach()
        position = (self._settled().float() + moved).reshape(len(q.scale), -1)
        return self.grid.decode(position, q).reshape(weight.shape).to(weight.dtype)

    @torch.no_grad()
    def coded(self, weight: Float[Tensor, "rows columns"]) -> Coded:
        self._settled()
        return self.inner.coded(weight)

    @torch.no_grad()
    def after_step(self) -> None:
        before, wanted = self.inner.codes.float().flatten(), self.codes.flatten()
        far = (wanted - before).abs()
        chosen = far.topk(int(self.share * len(far))).indices
        codes = before.clone()
        codes[chosen] = wanted[chosen].round().clamp(0, self.grid.top)
        left = (self.keep * (wanted - codes)).clamp(-EDGE, EDGE)
        self.codes.copy_((codes + left).reshape(self.codes.shape))
        self._settled()

    @torch.no_grad()
    def _settled(self) -> Tensor:
        """The codes of the positions as they are, which a checkpoint may have changed."""
        return self.inner.codes.copy_(self.codes.round())
