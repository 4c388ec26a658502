"""Bit allocation: the choice of one option per item under a budget of stored bits.

Items are linears, or groups of columns of one linear. Each has a cost and a size for every option;
the sum of costs is to be small while the sum of sizes stays within the budget.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import inf

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qexp.common.errors import check_int

Costs = Float[Tensor, "items options"]
Sizes = Int[Tensor, "items options"]


class OverBudget(ValueError):
    """A budget that no choice fits. least: bits that the smallest choice of the rule takes."""

    def __init__(self, least: int) -> None:
        super().__init__(f"the smallest choice takes {least} bits")
        self.least = least


class Rule(ABC):
    @abstractmethod
    def __call__(self, costs: Costs, sizes: Sizes, budget: int) -> list[int]:
        """The option of each item. sizes, budget: in bits. Raises OverBudget."""


@dataclass(frozen=True)
class Uniform(Rule):
    """One option for all items: of those that fit, the one with the least cost."""

    def __call__(self, costs: Costs, sizes: Sizes, budget: int) -> list[int]:
        totals = sizes.sum(0)
        if (least := int(totals.min())) > budget:
            raise OverBudget(least)
        option = costs.sum(0).masked_fill(totals > budget, inf).argmin()
        return [int(option)] * len(costs)


@dataclass(frozen=True)
class Lagrange(Rule):
    """argmin of cost + λ size for each item, with the smallest λ that fits the budget; what is left
    of it is spent greedily, on the largest decrease per bit.

    Before the greedy part, choices lie on the lower convex hull of each item's options.
    """

    def __call__(self, costs: Costs, sizes: Sizes, budget: int) -> list[int]:
        if (least := _least(sizes)) > budget:
            raise OverBudget(least)
        costs = costs.double()

        def choice(slope: float) -> Tensor:
            return (costs + slope * sizes).argmin(1)

        def fits(slope: float) -> bool:
            return int(_picked(sizes, choice(slope)).sum()) <= budget

        if fits(0.0):
            return spent(choice(0.0), costs, sizes, budget)
        # A difference in size is at least one bit, so with this slope the smallest option is taken.
        low, high = 0.0, 1 + 2 * float(costs.amax() - costs.amin())
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (low, middle) if fits(middle) else (middle, high)
        return spent(choice(high), costs, sizes, budget)


def spent(choice: Int[Tensor, " items"], costs: Costs, sizes: Sizes, budget: int) -> list[int]:
    """`choice`, changed one item at a time while a change that fits the budget lowers the cost:
    first one that takes no bits, then the one with the largest decrease per bit."""
    choice = choice.clone()
    while True:
        gains = _picked(costs, choice)[:, None] - costs
        extra = sizes - _picked(sizes, choice)[:, None]
        rest = budget - int(_picked(sizes, choice).sum())
        allowed = (extra <= rest) & (gains > 0)
        if not allowed.any():
            return choice.tolist()
        rates = torch.where(extra > 0, gains / extra.clamp(min=1), inf)
        item, option = divmod(int(rates.masked_fill(~allowed, -inf).argmax()), costs.shape[1])
        choice[item] = option


@dataclass(frozen=True)
class DP(Rule):
    """Dynamic programme over items: the best cost for every total size that can occur.

    Exact while no more than `states` totals are on the front of size and cost. With more of them,
    as many stretches of size keep their best total each, so that the result still fits the budget.
    """

    states: int = 10_000

    def __post_init__(self) -> None:
        check_int("method.rule", self, states=1)

    def __call__(self, costs: Costs, sizes: Sizes, budget: int) -> list[int]:
        if (least := _least(sizes)) > budget:
            raise OverBudget(least)
        options = costs.shape[1]
        later = (
            sizes.amin(1).flip(0).cumsum(0).flip(0)
        )  # the least that each item and those after take
        size, cost = torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.float64)
        kept: list[Tensor] = []  # by item: state before it · options + its option
        for item in range(len(costs)):
            rest = int(later[item + 1]) if item + 1 < len(costs) else 0
            size = (size[:, None] + sizes[item]).flatten()
            cost = (cost[:, None] + costs[item].double()).flatten()
            origin = (size + rest <= budget).nonzero()[:, 0]
            origin = origin[cost[origin].argsort(stable=True)]
            origin = origin[size[origin].argsort(stable=True)]
            best = cost[origin].cummin(0).values
            better = torch.ones_like(origin, dtype=torch.bool)
            better[1:] = best[1:] < best[:-1]
            origin = origin[better]
            if len(origin) > self.states:
                offset = size[origin] - size[origin[0]]
                stretch = offset * self.states // (offset[-1] + 1)
                last = torch.ones_like(stretch, dtype=torch.bool)
                last[:-1] = stretch[1:] != stretch[:-1]
                origin = origin[last]
            size, cost = size[origin], cost[origin]
            kept.append(origin)
        choice, state = [], len(size) - 1  # along the front, costs fall
        for origin in reversed(kept):
            state, option = divmod(int(origin[state]), options)
            choice.append(option)
        return choice[::-1]


def _least(sizes: Sizes) -> int:
    return int(sizes.amin(1).sum())


def _picked(table: Tensor, choice: Int[Tensor, " items"]) -> Tensor:
    return table.gather(1, choice[:, None])[:, 0]
