"""Base of grids whose values are unevenly spaced."""

from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.grid.base import Grid

NEAR = 0.4999  # positions stay so close to the code that they round to


class UnevenGrid(Grid):
    """A table of values, times a scale per row.

    Gradients: a value's `position` among the codes is rounded and clamped as on an integer grid, so
    surrogates see steps of one code. The width of a step divides on the way from values to codes
    and multiplies on the way back; both are left out, so dy/dx is the product of the two slopes.
    """

    @property
    @abstractmethod
    def levels(self) -> tuple[float, ...]:
        """The values in ascending order, unscaled."""

    @property
    def bits(self) -> int:
        return (len(self.levels) - 1).bit_length()

    @property
    def top(self) -> int:
        return len(self.levels) - 1

    @property
    def bounds(self) -> tuple[float, float]:
        return self.levels[0], self.levels[-1]

    def code_position(self, v: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """k at level k and linear between two levels, beyond the ends as in the last step; rounds
        to the code of the nearest level, ties included. Its gradient is 1 per unit of v."""
        table, edges = torch.tensor(self.levels), self._edges(torch.device("cpu"))
        value, top = v.detach().float().contiguous(), self.top
        # Half steps, from a level to an edge or from an edge to a level, and both sides beyond.
        bounds = torch.cat([torch.stack([table[:-1], edges], 1).flatten(), table[-1:]])
        near = (torch.arange(2 * top + 2) // 2).float()
        width = table.diff().repeat_interleave(2)
        width = torch.cat([width[:1], width, width[-1:]])
        low = torch.where(torch.arange(2 * top + 2) % 2 == 1, near, near - NEAR)
        high = torch.where(torch.arange(2 * top + 2) % 2 == 1, near + NEAR, near)
        low[0], high[-1] = -torch.inf, torch.inf
        low[-1] = torch.nextafter(near[-1], high[-1])  # a sum would round to the end itself
        step = torch.bucketize(value, bounds.to(v.device))
        near, level, width, low, high = (
            each.to(v.device)[step] for each in (near, table[near.long()], width, low, high)
        )
        at = (near + (value - level) / width).clamp(low, high)
        return at + (v - v.detach()).nan_to_num()  # an infinite value is clipped all the same

    def _edges(self, device: torch.device) -> Float[Tensor, " edges"]:
        """Midpoints between levels, lowered by one step of float32 where a tie rounds up."""
        table = torch.tensor(self.levels)
        middle = (table[1:] + table[:-1]) / 2
        # The distance from 0 in codes, where 0 is a level, has the parity of the mantissa.
        away = (torch.arange(len(table)) - int(table.abs().argmin())).abs()
        up = away[1:] % 2 == 0
        lowered = torch.nextafter(middle, torch.full_like(middle, -torch.inf))
        return torch.where(up, lowered, middle).to(device)
