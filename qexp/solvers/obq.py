"""OBQ (Optimal Brain Compression, Frantar and Alistarh, 2208.11580): greedy rounding by rows."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qexp.common.errors import check_bool, check_int, check_number
from qexp.grid import Grid, Scale
from qexp.packed.coded import Coded
from qexp.solvers.base import Solution
from qexp.solvers.factor import damped, inverse_factor
from qexp.solvers.importance import check_importance, importance_of
from qexp.solvers.refine import check_refit, refitted
from qexp.solvers.rtn import OnGrid

# (changes by rounding, variances [H⁻¹]_jj, weights that are still float) → a column for each row.
Choose = Callable[[Tensor, Tensor, Tensor], Int[Tensor, " rows"]]


@dataclass(frozen=True)
class OBQ(OnGrid):
    """Rounds, in each row, the weight whose rounding costs the least, (w - Q(w))² / [H⁻¹]_jj, and
    compensates for it in the weights that are still float.

    Every row has its own order, so the work grows with rows · columns³. The order leaves the inputs
    with the largest H_jj to the end, where nothing can compensate: the error may exceed GPTQ's.

    damp: share of the mean diagonal added to the diagonal; the reference has 0 and adds 1 where H
    is singular, here the damping is raised as everywhere.
    outside_first: a weight farther than half a step from its grid comes before the others, the
    farthest first (the reference). Weights that lie on the grid, such as pruned ones, stay.
    rows: solved together, each with its own factor in float64.
    importance, refit: as in GPTQ. Scales are fitted before the first weight is rounded.
    """

    grid: Grid
    damp: float = 0.0
    outside_first: bool = True
    rows: int = 16
    importance: str | None = None
    refit: bool = False

    def __post_init__(self) -> None:
        check_number("method.solver", self, damp=0)
        check_int("method.solver", self, rows=1)
        check_bool("method.solver", self, "outside_first", "refit")
        check_importance(self)
        if self.refit:
            check_refit(self.grid)

    def __call__(
        self,
        weight: Float[Tensor, "rows columns"],
        hessian: Float[Tensor, "columns columns"],
    ) -> Solution:
        factor = inverse_factor(hessian, self.damp, (torch.float64,))
        weight = weight.float().masked_fill(factor.dead, 0)
        importance = importance_of(
            self.importance, hessian.diagonal(), factor.upper.diagonal().float()
        )
        coded = Coded.of(self.grid, weight, self.grid.scales_of(weight, importance(weight, 0)))
        inverse, wide = factor.upper.T @ factor.upper, coded.per_column()
        parts: list[Tensor] = []
        for start in range(0, len(weight), self.rows):
            tile = slice(start, start + self.rows)
            q = Scale(wide.scale[tile].double(), wide.zero[tile].double())
            farthest = q.scale / 2 if self.outside_first else torch.full_like(q.scale, torch.inf)
            nearest = partial(self.grid.round, q=q)
            parts.append(greedy(weight[tile].double(), inverse, nearest, cheapest(farthest)))
        rounded = torch.cat(parts).float()
        packed = replace(coded, codes=self.grid.encode(rounded, wide).to(torch.int32))
        if self.refit:
            packed = refitted(packed, weight, damped(hessian, factor.damp))
        return Solution(packed.dequantize(), packed.bits(), packed, factor.damp)


def cheapest(farthest: Float[Tensor, "rows columns"]) -> Choose:
    """The least cost; before it the largest change among those above `farthest`; before all a
    change of 0."""

    def choose(
        change: Float[Tensor, "rows columns"],
        variance: Float[Tensor, "rows columns"],
        left: Bool[Tensor, "rows columns"],
    ) -> Int[Tensor, " rows"]:
        size = change.abs()
        cost = torch.where(size > farthest, -size, size.square() / variance)
        cost = cost.masked_fill(size == 0, -torch.inf)
        return cost.masked_fill(~left, torch.inf).argmin(1)

    return choose


def greedy(
    weight: Float[Tensor, "rows columns"],
    inverse: Float[Tensor, "columns columns"],
    nearest: Callable[[Tensor], Tensor],
    choose: Choose,
) -> Float[Tensor, "rows columns"]:
    """Rounds one weight of each row at a time, the one that `choose` names.

    A step removes a column from H⁻¹ (the paper's equation 3), which is a step of a pivoted Cholesky
    factorization: the rows of the factor are kept, and a column of the current inverse is made from
    them when it is needed, which reads a quarter of what updating the inverse reads and writes.
    """
    rest, rounded = weight.clone(), torch.zeros_like(weight)
    variance = inverse.diagonal().expand_as(weight).clone()
    tiny = torch.finfo(weight.dtype).tiny
    left = torch.ones_like(weight, dtype=torch.bool)
    each = torch.arange(len(weight), device=weight.device)
    factor = weight.new_zeros(len(weight), *inverse.shape)  # [rows, steps, columns]
    for step in range(weight.shape[1]):
        target = nearest(rest)
        j = choose(rest - target, variance, left)
        done = factor[:, :step]
        column = inverse[j] - torch.bmm(done[each, :, j][:, None], done)[:, 0]
        factor[:, step] = column / column[each, j].clamp(min=tiny).sqrt()[:, None]
        row = factor[:, step]
        rounded[each, j] = target[each, j]
        error = (rest - target)[each, j] / row[each, j]
        rest -= error[:, None] * row
        variance = (variance - row.square()).clamp(min=tiny)
        left[each, j] = False
    return rounded
