"""Alternation of a solver and of a low-rank product for its error."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.packed.low_rank import Factor, LowRank
from qexp.packed.plain import Plain
from qexp.solvers.base import Solution


def alternate(
    aim: Float[Tensor, "rows columns"],
    solve: Callable[[Tensor], Solution],
    factors: Callable[[Tensor], tuple[Factor, Factor]],
    measure: Callable[[Tensor], float],
    rounds: int,
    factors_first: bool,
    until_worse: bool,
) -> Solution:
    """The round with the least error of: round what a product leaves, then take the product for the
    error of that.

    aim: the matrix to be near. solve: of a product that is subtracted first. factors: the stored
    factors for an error. measure: of a change of `aim`. rounds, factors_first, until_worse: as in
    `low_rank.Correction`.
    """
    product = torch.zeros_like(aim)
    if factors_first:
        product = LowRank(Plain(product), *factors(aim)).dequantize()
    found: list[tuple[float, Solution]] = []
    for _ in range(rounds):
        base = solve(product)
        packed = LowRank(base.packed, *factors(aim - base.packed.dequantize()))
        weight = packed.dequantize()
        solution = Solution(weight, packed.bits(), packed, base.damp)
        found.append((measure(weight - aim), solution))
        if until_worse and len(found) > 1 and found[-1][0] > found[-2][0]:
            break
        product = weight - base.packed.dequantize()
    return min(found, key=lambda each: each[0])[1]


def nearest_product(
    error: Float[Tensor, "rows columns"], upper: Float[Tensor, "columns columns"], rank: int
) -> tuple[Float[Tensor, "rows rank"], Float[Tensor, "rank columns"]]:
    """A and B with the least tr((E - A B) M (E - A B)ᵀ), for M⁻¹ = Uᵀ U with `upper` = U.

    With R = U⁻¹ it is the truncated singular value decomposition of E R, times U; what remains is
    the sum of the squares of the singular values that are left out. Singular values are shared
    evenly between A and B. In float64.
    """
    upper = upper.double()
    weighted = torch.linalg.solve_triangular(upper, error.double(), upper=True, left=False)
    left, values, right = torch.linalg.svd(weighted, full_matrices=False)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, (root[:, None] * right[:rank]) @ upper
