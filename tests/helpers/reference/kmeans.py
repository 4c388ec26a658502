"""Weighted k-means in one dimension: the optimum by a dynamic programme, and Lloyd's algorithm."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def optimum(values: Tensor, weights: Tensor, levels: int) -> float:
    """The least Σ F (v - c(v))² of one row."""
    order = values.argsort()
    v, f = values[order].double(), weights[order].double()
    mass, moment, square = (pad((f * v**power).cumsum(0), (1, 0)) for power in range(3))
    share, first, second = (each[None, :] - each[:, None] for each in (mass, moment, square))
    cost = torch.where(share > 0, second - first**2 / share, torch.inf).fill_diagonal_(0)
    best = cost[0]
    for _ in range(levels - 1):
        best = (best[:, None] + cost).amin(0)
    return float(best[-1])


def lloyd(values: Tensor, weights: Tensor, table: Tensor, codes: Tensor, rounds: int) -> Tensor:
    """The table of one row after this many updates of the means, codes in between."""
    for turn in range(rounds):
        if turn:
            codes = (values[:, None] - table).abs().argmin(1)
        for code in codes.unique():
            own = codes == code
            table[code] = (weights[own] * values[own]).sum() / weights[own].sum()
    return table
