"""Rounding in a Kronecker product of two Hessians, of inputs and of outputs (YAQA, 2505.22988)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from qexp.common.errors import check_bool, check_int, check_number
from qexp.grid import Grid, Scale
from qexp.packed.coded import Coded
from qexp.solvers.base import Solution, error
from qexp.solvers.both_sides import sides
from qexp.solvers.factor import inverse_factor, ordered
from qexp.solvers.rtn import OnGrid

# (values, their rows, their columns) → the rounded values
Nearest = Callable[
    [Float[Tensor, "*shape"], Int[Tensor, "*shape"], Int[Tensor, "*shape"]],
    Float[Tensor, "*shape"],
]


@dataclass(frozen=True)
class TwoSided(OnGrid):
    """Rounds weight by weight, errors spread over later rows and columns: tr(H_O Δ H_I Δᵀ) becomes
    small. It is GPTQ on the weights as one row, with the Hessian H_O ⊗ H_I.

    Weights on one antidiagonal do not change each other and are rounded together. Scales are fitted
    before. The reference takes tiles of 16 x 16 from the last to the first.

    damp: share of each side's mean diagonal added to its diagonal.
    act_order: rows and columns by descending diagonal of their Hessian.
    block: side of the tiles that are rounded together; no effect on the result.
    """

    grid: Grid
    damp: float | int = 0.01
    act_order: bool = False
    block: int = 32

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
    factor = inverse_factor(hessian, damp, order=order)
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
    block: side of the tiles; affects speed only. Tiles on one antidiagonal are rounded together.
    """
    rows, columns = weight.shape
    tall, wide = -(-rows // block), -(-columns // block)
    below, beyond = tall * block - rows, wide * block - columns
    # What is added comes last and moves nothing.
    rest = pad(weight.float(), (0, beyond, 0, below)).clone()
    left, right = _extended(left, below), _extended(right, beyond)
    out = torch.empty_like(rest)

    def inside(values: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return nearest(values, i.clamp(max=rows - 1), j.clamp(max=columns - 1))

    for wave in range(tall + wide - 1):
        across = range(max(0, wave - wide + 1), min(tall, wave + 1))
        corners = [(i * block, (wave - i) * block) for i in across]
        high = torch.arange(across.start, across.stop, device=weight.device)
        top, first = high * block, (wave - high) * block
        tiles, lefts, rights = (
            torch.stack([_tile(whole, *at, block) for at in places])
            for whole, places in (
                (rest, corners),
                (left, [(i, i) for i, _ in corners]),
                (right, [(j, j) for _, j in corners]),
            )
        )
        rounded, errors = _rounded(tiles, lefts, rights, inside, top, first)
        for (i, j), values, own in zip(corners, rounded, errors, strict=True):
            _tile(out, i, j, block).copy_(values)
            rest[i:, j:] -= left[i : i + block, i:].T @ (own @ right[j : j + block, j:])
    return out[:rows, :columns].contiguous()


def _extended(factor: Float[Tensor, "n n"], more: int) -> Float[Tensor, "m m"]:
    """A factor of `more` further rows and columns, those of the identity."""
    factor = pad(factor, (0, more, 0, more))
    factor.diagonal()[len(factor) - more :] = 1
    return factor


def _tile(
    whole: Float[Tensor, "_ _"], top: int, first: int, block: int
) -> Float[Tensor, "block block"]:
    return whole[top : top + block, first : first + block]


def _rounded(
    weight: Float[Tensor, "tiles block block"],
    left: Float[Tensor, "tiles block block"],
    right: Float[Tensor, "tiles block block"],
    nearest: Nearest,
    top: Int[Tensor, " tiles"],
    first: Int[Tensor, " tiles"],
) -> tuple[Float[Tensor, "tiles block block"], Float[Tensor, "tiles block block"]]:
    """The rounded values of tiles and their errors, divided by both factors' diagonals."""
    block = weight.shape[1]
    out, errors = torch.empty_like(weight), torch.zeros_like(weight)
    spread = torch.zeros_like(weight)  # errors @ right, as far as errors are known
    scales = left.diagonal(dim1=1, dim2=2)[:, :, None] * right.diagonal(dim1=1, dim2=2)[:, None]
    every = torch.arange(block, device=weight.device)
    for step in range(2 * block - 1):
        i = every[max(0, step - block + 1) : min(block, step + 1)]
        j = step - i
        target = weight[:, i, j] - (left[:, :, i] * spread[:, :, j]).sum(1)
        value = nearest(target, top[:, None] + i, first[:, None] + j)
        own = (target - value) / scales[:, i, j]
        out[:, i, j], errors[:, i, j] = value, own
        spread[:, i] += own[:, :, None] * right[:, j]
    return out, errors
