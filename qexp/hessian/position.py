"""Traces of Hessians by the position of tokens in a text."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.hessian.from_gradients import FromGradients

KINDS = ("layerwise", "token", "output")


@dataclass(frozen=True)
class TraceByPosition(FromGradients):
    """The traces of Σ_t x_t x_tᵀ, Σ_t ‖g_t‖² x_t x_tᵀ and Σ_n G[n]ᵀ G[n] (KINDS), by position of t:
    [2, 3, tokens] for each linear, the factor of `loss_scale` taken out. The first are the sums of
    the tokens' parts, the second the sums of their squares.

    tokens: of a sequence. With ‖G[n]‖² = Σ_t g_tᵀ G[n] x_t the terms between two tokens count half
    for the position of each, so that a position's part may be negative.
    """

    tokens: int = 1

    def shape(self, rows: int, columns: int) -> tuple[int, ...]:
        return 2, len(KINDS), self.tokens

    def add(
        self,
        total: Float[Tensor, "2 kinds tokens"],
        x: Float[Tensor, "tokens columns"],
        g: Float[Tensor, "tokens rows"],
    ) -> None:
        own = x.square().sum(1)
        between = ((g @ (g.T @ x)) * x).sum(1)
        scale = self.loss_scale**2
        parts = torch.stack([own, g.square().sum(1) * own / scale, between / scale])
        total += torch.stack([parts, parts.square()])

    def finished(
        self, total: Float[Tensor, "2 kinds tokens"], columns: int
    ) -> Float[Tensor, "2 kinds tokens"]:
        return total

    def per_input(
        self, hessian: Float[Tensor, "2 kinds tokens"], columns: int
    ) -> Sequence[Float[Tensor, " columns"]]:
        return ()
