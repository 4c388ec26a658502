"""Rounding in a Kronecker product of two Hessians, of inputs and of outputs (YAQA, 2505.22988)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qexp.common.errors import check_bool, check_int, check_number
from qexp.grid import Grid, Scale
from qexp.packed.coded import Coded
from qexp.solvers.base import Solution, error
from qexp.solvers.both_sides import sides
from qexp.solvers.factor import inverse_factor, ordered
from qexp.solvers.rtn import OnGrid

# (values, their rows, their columns) → the rounded values
Nearest = Callable[
    [Float[Tensor, " count"], Int[Tensor, " count"], Int[Tensor, " count"]],
    Float[Tensor, " count"],
]


@dataclass(frozen=True)
class TwoSided(OnGrid):
    """Rounds weight by weight, errors spread over later rows and columns: tr(H_O Δ H_I Δᵀ) becomes
    small. It is GPTQ on the weights as one row, with the Hessian H_O ⊗ H_I.

    Weights on one antidiagonal do not change each other and are rounded together. Scales are fitted
    before. The reference takes tiles of 16 x 16 from the last to the first.

    damp: share of each side's mean diagonal added to its diagonal.
    act_order: rows and columns by descending diagonal of their Hessian.
    block: side of the tiles after which the rest is updated; no effect on the result.
    """

    grid: Grid
    damp: float | int = 0.01
    act_order: bool = False
    block: int = 128

    def __post_init__(self) -> None:
        check_number("method.solver", self, damp=0)
        check_int("method.solver", self, block=1)
        check_bool("method.solver", self, "act_order")

    @property
    def rowwise(self) -> bool:
        return False

    @property
    def needs_both_sides(self) -> bool:
        return True

    def measure(
        self, change: Float[Tensor, "rows columns"], hessian: Float[Tensor, " both"] | None
    ) -> float:
        if hessian is None:
            return error(change, None)
        inputs, outputs = sides(hessian, change.shape[1])
        moved = outputs @ change.float() @ inputs
        return float(torch.sum(moved * change, dtype=torch.float64))

    def __call__(
        self, weight: Float[Tensor, "rows columns"], hessian: Float[Tensor, " both"]
    ) -> Solution:
        columns = weight.shape[1]
        inputs, outputs = sides(hessian, columns)
        weight, factor, order, place = ordered(weight, inputs, self.damp, self.act_order)
        weight, left, rows, row_place = _ordered_rows(weight, outputs, self.damp, self.act_order)
        scales = self.grid.scales_of(weight[row_place][:, place])
        size = columns // self.grid.groups(columns)
        scale, zero = (part[rows][:, order // size] for part in (scales.scale, scales.zero))

        def nearest(values: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return self.grid.round(values, Scale(scale[i, j], zero[i, j]))

        rounded = antidiagonal_sweep(weight, left, factor.upper, nearest, self.block)
        packed = Coded.of(self.grid, rounded[row_place][:, place], scales)
        return Solution(packed.dequantize(), packed.bits(), packed, factor.damp)


def _ordered_rows(
    weight: Float[Tensor, "rows columns"],
    hessian: Float[Tensor, "rows rows"],
    damp: float,
    act_order: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The matrix in the order of its rows, their factor, the order, and each row's place in it. An
    output that no loss depends on is rounded like the others."""
    order = torch.arange(len(weight), device=weight.device)
    if act_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    factor = inverse_factor(hessian[order][:, order], damp)
    return weight[order], factor.upper, order, torch.argsort(order)


def antidiagonal_sweep(
    weight: Float[Tensor, "rows columns"],
    left: Float[Tensor, "rows rows"],
    right: Float[Tensor, "columns columns"],
    nearest: Nearest,
    block: int,
) -> Float[Tensor, "rows columns"]:
    """Round weight (i, j) after all (a, b) with a ≤ i and b ≤ j, and spread its error over the
    weights with a ≥ i and b ≥ j.

    left, right: the upper Cholesky factors of the inverse Hessians of outputs and inputs.
    block: side of the tiles; affects speed only.
    """
    rest = weight.float().clone()
    out = torch.empty_like(rest)
    for top in range(0, len(rest), block):
        rows = slice(top, top + block)
        corner = left[rows, rows]
        errors = torch.zeros_like(rest[rows])
        for first in range(0, rest.shape[1], block):
            columns = slice(first, first + block)
            out[rows, columns], errors[:, columns] = _tile(
                rest[rows, columns], corner, right[columns, columns], nearest, top, first
            )
            later = slice(first + block, None)
            rest[rows, later] -= corner.T @ (errors[:, columns] @ right[columns, later])
        below = slice(top + block, None)
        rest[below] -= left[rows, below].T @ (errors @ right)
    return out


def _tile(
    weight: Float[Tensor, "rows columns"],
    left: Float[Tensor, "rows rows"],
    right: Float[Tensor, "columns columns"],
    nearest: Nearest,
    top: int,
    first: int,
) -> tuple[Float[Tensor, "rows columns"], Float[Tensor, "rows columns"]]:
    """The rounded values of one tile and their errors, each divided by both factors' diagonals."""
    rows, columns = weight.shape
    out, errors = torch.empty_like(weight), torch.zeros_like(weight)
    spread = torch.zeros_like(weight)  # errors @ right, as far as errors are known
    scales = left.diagonal()[:, None] * right.diagonal()
    every = torch.arange(rows, device=weight.device)
    for step in range(rows + columns - 1):
        i = every[max(0, step - columns + 1) : min(rows, step + 1)]
        j = step - i
        target = weight[i, j] - (left[:, i] * spread[:, j]).sum(0)
        out[i, j] = nearest(target, top + i, first + j)
        errors[i, j] = (target - out[i, j]) / scales[i, j]
        spread[i] += errors[i, j, None] * right[j]
    return out, errors
