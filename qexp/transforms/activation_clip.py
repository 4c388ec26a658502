"""Learned ends of the ranges of activations (FlatQuant's LAC)."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qexp.gradients import Straight
from qexp.grid.shares import Shares
from qexp.quantizers.scheme import Activations, QuantizedActivations


def is_learnable(activation: Activations) -> bool:
    """Whether ranges are of each tensor as it comes, so that a share of them can be learned."""
    return isinstance(activation, QuantizedActivations) and activation.dynamic


class ActivationClip(nn.Module):
    """The quantizer of one tensor, whose range is sigmoid(low) min to sigmoid(high) max of what
    the scheme would take; both begin with 4 (FlatQuant, 2410.09426)."""

    def __init__(self, activation: Activations) -> None:
        super().__init__()
        assert isinstance(activation, QuantizedActivations)
        self.activation = activation
        self.low, self.high = (nn.Parameter(torch.tensor(4.0)) for _ in range(2))

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        inner = self.activation.grid
        shares = Shares(inner.range, self.low.sigmoid(), self.high.sigmoid())
        grid = replace(inner, range=shares)  # type: ignore[type-var]
        return replace(self.activation, grid=grid).rounded(x, Straight())

    @property
    def shares(self) -> tuple[float, float]:
        return float(self.low.sigmoid()), float(self.high.sigmoid())
