"""Ranges without the outermost values of each vector."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.common.errors import check_range
from qexp.grid.base import Grid, Interval, Range


@dataclass(frozen=True)
class Trimmed(Range):
    """The interval of what is left without the `share` of outermost values, half of them at each
    end and at least one; bounds are values that occur (KVQuant, 2401.18079)."""

    share: float | int = 0.01

    def __post_init__(self) -> None:
        check_range("range", self, "a number above 0 and below 1", lambda x: 0 < x < 1, "share")

    def __call__(
        self,
        x: Float[Tensor, "rows size"],
        grid: Grid,
        counts: Float[Tensor, "rows size"] | None = None,
    ) -> Interval:
        order = x.sort(dim=1)
        weight = torch.ones_like(x) if counts is None else counts.gather(1, order.indices)
        below = weight.double().cumsum(1)
        left_out = (below[:, -1:] * self.share / 2).ceil()
        low = torch.searchsorted(below, left_out, right=True)
        high = torch.searchsorted(below, below[:, -1:] - left_out)
        low, high = (index.clamp(max=x.shape[1] - 1) for index in (low, high))
        return order.values.gather(1, torch.minimum(low, high)), order.values.gather(1, high)
