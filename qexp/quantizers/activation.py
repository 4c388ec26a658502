"""Quantize and dequantize in floating point: quantizers of activations."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qexp.grid import Grid, Scale
from qexp.grid.observers import Observer
from qexp.quantizers.fake_quantize import FakeQuantize, as_stored, lsq_gradient_scale


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
        self.observer: Observer | None = None
        self.enabled = False
        self.fake_quantize, self.highest_code = FakeQuantize(), 1.0
        self.register_buffer("scale", torch.ones(0, 1))
        self.register_buffer("zero", torch.zeros(0, 1))

    def start_observing(self) -> None:
        if not self.dynamic:
            self.observer = self.grid.range.observer()

    def fix_range(self) -> None:
        """Fit what was observed and start to round."""
        if self.observer is not None:
            device = self.scale.device
            q = self.grid.fit(*self.observer.values())
            self.scale, self.zero = q.scale.to(device), q.zero.to(device)
            self.observer = None
        self.enabled = True

    def make_trainable(self, fake_quantize: FakeQuantize, offset: bool) -> None:
        """Train a static scale, with its zero point where there is one and `offset` says so."""
        self.fake_quantize = fake_quantize
        if not self.dynamic:
            self.highest_code = max(self.grid.bounds[1] - float(self.zero.mean()), 1.0)
            self._keep(nn.Parameter(self.scale), self.zero)
            if offset and self.grid.has_zero:
                self._keep(self.scale, nn.Parameter(self.zero))

    def make_constant(self) -> None:
        """What was learned, as storage keeps it, for good."""
        q = as_stored(self.scale.detach(), self.zero.detach(), self.grid)
        self._keep(q.scale, q.zero)
        self.fake_quantize = FakeQuantize()

    def place(self) -> Scale:
        """Where the static grid lies, as storage would keep it."""
        if self.scale.requires_grad or self.zero.requires_grad:
            return as_stored(self.scale, self.zero, self.grid)
        return Scale(self.scale, self.zero)

    def _keep(self, scale: Tensor, zero: Tensor) -> None:
        for name, tensor in (("scale", scale), ("zero", zero)):
            delattr(self, name)
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        if self.observer is not None:
            self.observer.add(x)
        if not self.enabled:
            return x
        if self.dynamic:
            rows = x.reshape(-1, x.shape[-1])
            q = self.grid.scales_of(rows.detach().float())
            return self.fake_quantize.rows(rows, q, self.grid, training=self.training).reshape(
                x.shape
            )
        q = self.place()
        return self.fake_quantize(
            x, q, self.grid, lsq_gradient_scale(x.numel(), self.highest_code), self.training
        )

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        # A fresh quantizer has no scales yet; take the shapes that the file brings.
        for name in ("scale", "zero"):
            if prefix + name in state and not isinstance(getattr(self, name), nn.Parameter):
                setattr(self, name, torch.empty_like(state[prefix + name]))
        self.enabled = True
        super()._load_from_state_dict(state, prefix, *rest)
