"""Quantize and dequantize in floating point: quantizers of activations."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qexp.errors import UserError
from qexp.fused import Formula, gain, placed
from qexp.grid import Grid, Scale
from qexp.ranges import MinMax

# Bins of a streamed histogram. The range doubles as values need it, so at worst half of the bins
# lie within the data: a bin is 2⁻¹⁵ of the largest magnitude.
BINS = 2**16


class Summary:
    """What a static range needs to know of a stream of values, in bounded memory."""

    def __init__(self, histogram: bool) -> None:
        self.low, self.high, self.reach = torch.inf, -torch.inf, 0.0
        self.counts = torch.zeros(BINS if histogram else 0, dtype=torch.float64)

    def add(self, x: Float[Tensor, "..."]) -> None:
        low, high = (float(v) for v in x.detach().aminmax())
        if not (low - low == 0 and high - high == 0):  # NaN or infinity
            raise UserError(
                "activation: a calibration activation is not finite; the model or its dtype "
                "overflows (model.dtype), so no static range can hold it."
            )
        self.low, self.high = min(self.low, low), max(self.high, high)
        if len(self.counts):
            self._widen(max(abs(low), abs(high)))
            x = x.detach().float().cpu()
            self.counts += torch.histc(x, BINS, -self.reach, self.reach).double()

    def _widen(self, magnitude: float) -> None:
        if not self.reach:
            self.reach = max(magnitude, torch.finfo(torch.float32).tiny)
        while magnitude > self.reach:
            merged = self.counts.reshape(-1, 2).sum(1)
            self.counts = torch.zeros_like(self.counts)
            self.counts[BINS // 4 : BINS // 4 + len(merged)] = merged
            self.reach *= 2

    def fit(self, grid: Grid) -> Scale:
        """The grid's scale for what was seen. The ends are exact; between them are bins."""
        if self.low > self.high:
            raise UserError("activation: the calibration data never reached a quantized tensor.")
        ends = torch.tensor([[self.low, self.high]])
        if not len(self.counts):
            return grid.fit(ends)
        used = self.counts.nonzero().flatten()
        width = 2 * self.reach / BINS
        centers = (-self.reach + (used + 0.5) * width).clamp(self.low, self.high).float()
        # The outermost bins stand for the ends themselves.
        centers[0], centers[-1] = self.low, self.high
        return grid.fit(centers[None], self.counts[used][None].float())


class FakeQuant(nn.Module):
    """A tensor rounded to a grid on its way.

    dynamic: scales from the tensor at hand, one per vector along the last axis (token), or per
    group of it, or per tensor, as the grid says. Otherwise one scale for good, fitted by the grid's
    range estimator on what passes between `observe` and `settle`. Before `settle` nothing is
    rounded. Gradients pass straight through, until `learn` chooses others; between `learn` and
    `freeze` a static scale is a parameter.
    """

    scale: Tensor
    zero: Tensor

    def __init__(self, grid: Grid, dynamic: bool) -> None:
        super().__init__()
        self.grid, self.dynamic = grid, dynamic
        self.summary: Summary | None = None
        self.on = False
        self.formula, self.reach = Formula(), 1.0
        self.register_buffer("scale", torch.ones(0, 1))
        self.register_buffer("zero", torch.zeros(0, 1))

    def observe(self) -> None:
        if not self.dynamic:
            self.summary = Summary(histogram=not isinstance(self.grid.range, MinMax))

    def settle(self) -> None:
        """Fit what was observed and start to round."""
        if self.summary is not None:
            device = self.scale.device
            q = self.summary.fit(self.grid)
            self.scale, self.zero = q.scale.to(device), q.zero.to(device)
            self.summary = None
        self.on = True

    def learn(self, formula: Formula, offset: bool) -> None:
        """Train a static scale, with its zero point where there is one and `offset` says so."""
        self.formula = formula
        if not self.dynamic:
            self.reach = max(self.grid.ends[1] - float(self.zero.mean()), 1.0)
            self._keep(nn.Parameter(self.scale), self.zero)
            if offset and self.grid.has_zero:
                self._keep(self.scale, nn.Parameter(self.zero))

    def freeze(self) -> None:
        """What was learned, as storage keeps it, for good."""
        q = placed(self.scale.detach(), self.zero.detach(), self.grid)
        self._keep(q.scale, q.zero)
        self.formula = Formula()

    def _place(self) -> Scale:
        if self.scale.requires_grad or self.zero.requires_grad:
            return placed(self.scale, self.zero, self.grid)
        return Scale(self.scale, self.zero)

    def _keep(self, scale: Tensor, zero: Tensor) -> None:
        for name, tensor in (("scale", scale), ("zero", zero)):
            delattr(self, name)
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        if self.summary is not None:
            self.summary.add(x)
        if not self.on:
            return x
        if self.dynamic:
            rows = x.reshape(-1, x.shape[-1])
            q = self.grid.scales_of(rows.detach().float())
            return self.formula.rows(rows, q, self.grid).reshape(x.shape)
        q = self._place()
        return self.formula(x, q, self.grid, gain(x.numel(), self.reach), self.training)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        # A fresh quantizer has no scales yet; take the shapes that the file brings.
        for name in ("scale", "zero"):
            if prefix + name in state and not isinstance(getattr(self, name), nn.Parameter):
                setattr(self, name, torch.empty_like(state[prefix + name]))
        self.on = True
        super()._load_from_state_dict(state, prefix, *rest)
