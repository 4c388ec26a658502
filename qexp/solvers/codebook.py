"""Codebooks of rows: nearest entries, tables by least squares.

A table holds the values of each row in ascending order. A value halfway between two entries takes
the lower one.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from qexp.grid.kmeans import CHUNK, edges
from qexp.solvers.sweep import Rule


def nearest_codes(
    values: Float[Tensor, "rows columns"], table: Float[Tensor, "rows levels"]
) -> Int[Tensor, "rows columns"]:
    """The index of the entry nearest to each value in the table of its row."""
    return torch.searchsorted(edges(table), values.contiguous())


def onto(table: Float[Tensor, "rows levels"]) -> Rule:
    """The rule of the sweep and of coordinate descent: the nearest entries for a column."""
    between = edges(table)

    def rule(w: Tensor, _: int) -> Tensor:
        return table.gather(1, torch.searchsorted(between, w[:, None])).squeeze(1)

    return rule


def ascending(
    codes: Int[Tensor, "rows columns"], table: Float[Tensor, "rows levels"]
) -> tuple[Int[Tensor, "rows columns"], Float[Tensor, "rows levels"]]:
    """The same values from tables in ascending order."""
    table, order = table.sort(dim=1, stable=True)
    return order.argsort(1).gather(1, codes), table


def least_squares(
    weight: Float[Tensor, "rows columns"],
    hessian: Float[Tensor, "columns columns"],
    codes: Int[Tensor, "rows columns"],
    table: Float[Tensor, "rows levels"],
    ridge: float = 1e-7,
) -> Float[Tensor, "rows levels"]:
    """The tables that minimize tr(Δ H Δᵀ) with these codes, in any order: with P the one-hot codes
    of a row, c + (Pᵀ H P + λI)⁻¹ Pᵀ H (w - P c).

    λ is `ridge` times the mean diagonal of Pᵀ H P. It draws to the table as it was, so that entries
    without a code stay there and the objective does not rise.
    """
    columns, levels = weight.shape[1], table.shape[1]
    solved, rows = [], max(CHUNK // (columns * levels), 1)
    for at, aim, old in zip(*(x.split(rows) for x in (codes, weight, table)), strict=True):
        chosen = one_hot(at, levels).to(hessian.dtype).transpose(1, 2).contiguous()
        spread = (chosen.reshape(-1, columns) @ hessian).reshape(chosen.shape)
        left = aim - old.gather(1, at)
        slopes = (spread @ left[:, :, None]).double()
        gram = (spread @ chosen.transpose(1, 2)).double()
        diagonal = gram.diagonal(dim1=1, dim2=2)
        diagonal += ridge * diagonal.mean(1, keepdim=True) + torch.finfo(torch.float32).tiny
        moved = torch.linalg.solve(gram, slopes).squeeze(2)
        solved.append(old + moved.to(table.dtype))
    return torch.cat(solved)
