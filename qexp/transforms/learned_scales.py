"""Learned ends of weight ranges, and learned scales and shifts of channels (OmniQuant)."""

from contextlib import AbstractContextManager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qexp.gradients import Straight
from qexp.grid import Grid
from qexp.transforms.scale_search import smoothed
from qexp.transforms.site_statistics import SiteStatistics


class Clipping(nn.Module):
    """Learnable weight clipping: each group's range is sigmoid(low) min to sigmoid(high) max."""

    def __init__(self, grid: Grid, weight: Float[Tensor, "rows columns"]) -> None:
        super().__init__()
        self.grid = grid
        count = 1 if grid.per_tensor else len(weight) * grid.groups(weight.shape[1])
        self.low = nn.Parameter(torch.full((count, 1), 4.0, device=weight.device))
        self.high = nn.Parameter(torch.full((count, 1), 4.0, device=weight.device))

    def ends(self, groups: Float[Tensor, "groups size"]) -> tuple[Tensor, Tensor]:
        low = torch.sigmoid(self.low) * groups.amin(1, keepdim=True)
        high = torch.sigmoid(self.high) * groups.amax(1, keepdim=True)
        if self.grid.has_zero:
            return low, high
        bound = torch.maximum(low.abs(), high.abs())  # a symmetric grid has one bound
        return -bound, bound

    def forward(self, weight: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        groups = weight.float().reshape(len(self.low), -1)
        q = self.grid.scale_for(*self.ends(groups))
        return self.grid.round(groups, q, Straight()).reshape(weight.shape)

    @torch.no_grad()
    def clamp(self, weight: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        """The weight clipped to its learned bounds."""
        groups = weight.float().reshape(len(self.low), -1)
        return groups.clamp(*self.ends(groups)).reshape(weight.shape).to(weight)


class Shape(nn.Module):
    """A learned scale exp(theta) per channel, and optionally a learned shift."""

    def __init__(self, site: SiteStatistics, shift: bool, alpha: float = 0.5) -> None:
        super().__init__()
        self.channels = site.channels
        low, high = site.ends
        self.shift = None
        largest = site.largest
        if shift and self.channels.shiftable:
            self.shift = nn.Parameter((low + high) / 2)
            largest = (high - low) / 2
        self.theta = nn.Parameter(smoothed(largest, self.channels.weights(), alpha).log())

    def forward(self) -> Float[Tensor, " channels"]:
        return torch.exp(self.theta)

    def live(self) -> AbstractContextManager[None]:
        shift = self.shift
        return (
            self.channels.live(self) if shift is None else self.channels.live(self, lambda: shift)
        )

    def fold(self) -> None:
        self.channels.fold(self().detach(), None if self.shift is None else self.shift.detach())
