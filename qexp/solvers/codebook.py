"""Codebooks of rows: nearest entries, weighted k-means in one dimension, tables by least squares.

A table holds the values of each row in ascending order. A value halfway between two entries takes
the lower one.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot, pad

from qexp.solvers.sweep import Rule

# Numbers in a temporary tensor, on a CPU about what fits into its cache.
CHUNK = 2**17


def nearest_codes(
    values: Float[Tensor, "rows columns"], table: Float[Tensor, "rows levels"]
) -> Int[Tensor, "rows columns"]:
    """The index of the entry nearest to each value in the table of its row."""
    return torch.searchsorted(_edges(table), values.contiguous())


def onto(table: Float[Tensor, "rows levels"]) -> Rule:
    """The rule of the sweep and of coordinate descent: the nearest entries for a column."""
    edges = _edges(table)

    def rule(w: Tensor, _: int) -> Tensor:
        return table.gather(1, torch.searchsorted(edges, w[:, None])).squeeze(1)

    return rule


def ascending(
    codes: Int[Tensor, "rows columns"], table: Float[Tensor, "rows levels"]
) -> tuple[Int[Tensor, "rows columns"], Float[Tensor, "rows levels"]]:
    """The same values from tables in ascending order."""
    table, order = table.sort(dim=1, stable=True)
    return order.argsort(1).gather(1, codes), table


def kmeans(
    values: Float[Tensor, "rows columns"],
    weights: Float[Tensor, "each columns"],
    levels: int,
    steps: int = 50,
) -> Float[Tensor, "rows levels"]:
    """Tables c with a small Σ_j F_j (v_j - c(v_j))² in each row, float64.

    Lloyd's algorithm, at most `steps` times, from evenly spaced values; before each step the best
    split of one cluster is traded for the cheapest union of two neighbours, where that pays. Both
    lower the sum, so no table is worse than the evenly spaced one.

    weights: F, 0 or more, for each row or [1, columns] for all. A row of zeros counts as one of
    equal weights. An empty cluster keeps its centre.
    """
    weights = weights.expand_as(values)
    rows = max(CHUNK // values.shape[1], 1)
    pieces = zip(values.split(rows), weights.split(rows), strict=True)
    return torch.cat([_kmeans(*piece, levels, steps) for piece in pieces])


def _kmeans(
    values: Float[Tensor, "rows columns"],
    weights: Float[Tensor, "rows columns"],
    levels: int,
    steps: int,
) -> Float[Tensor, "rows levels"]:
    ordered, order = values.double().sort(1)
    mass = weights.double().gather(1, order)
    mass = torch.where(mass.any(1, keepdim=True), mass, 1.0)
    sums = Sums(*(pad(each.cumsum(1), (1, 0)) for each in (mass, mass * ordered)))
    low, high = ordered[:, :1], ordered[:, -1:]
    centres = low + (high - low) * torch.linspace(0, 1, levels).to(low)
    bounds, found = _bounds(ordered, centres), torch.empty_like(centres)
    left = torch.arange(len(values), device=values.device)
    for _ in range(steps):
        before, bounds = bounds, _traded(sums, bounds)
        centres = sums.means(bounds, centres)
        bounds = _bounds(ordered, centres)
        moving = (bounds != before).any(1)
        found[left] = sums.means(bounds, centres)
        left, ordered, centres, bounds = (x[moving] for x in (left, ordered, centres, bounds))
        sums = Sums(*(each[moving] for each in sums))
        if not len(left):
            break
    return found.sort(1).values


def _bounds(
    ordered: Float[Tensor, "rows columns"], centres: Float[Tensor, "rows levels"]
) -> Int[Tensor, "rows bounds"]:
    """Where each cluster of a sorted row begins, and the end of the last."""
    inner = torch.searchsorted(ordered, _edges(centres.sort(1).values), right=True)
    return pad(pad(inner, (1, 0)), (0, 1), value=ordered.shape[1])


class Sums(NamedTuple):
    """Running sums of F and F·v over a sorted row, both from 0."""

    mass: Float[Tensor, "rows ends"]
    moment: Float[Tensor, "rows ends"]

    def saved(
        self, start: Int[Tensor, "rows many"], stop: Int[Tensor, "rows many"]
    ) -> Float[Tensor, "rows many"]:
        """By how much the mean of a run lowers Σ F v²."""
        mass, moment = (each.gather(1, stop) - each.gather(1, start) for each in self)
        return torch.where(mass > 0, moment.square() / mass, 0.0)

    def means(
        self, bounds: Int[Tensor, "rows bounds"], otherwise: Float[Tensor, "rows levels"]
    ) -> Float[Tensor, "rows levels"]:
        """The mean between each two bounds; `otherwise` where there is no mass."""
        mass, moment = (each.gather(1, bounds).diff(dim=1) for each in self)
        return torch.where(mass > 0, moment / mass, otherwise)


def _traded(sums: Sums, bounds: Int[Tensor, "rows bounds"]) -> Int[Tensor, "rows bounds"]:
    """In each row the bound that is missed least, moved to where one helps most, if that pays."""
    starts, stops = bounds[:, :-1].contiguous(), bounds[:, 1:].contiguous()
    alone = sums.saved(starts, stops)
    cut = torch.arange(1, sums.mass.shape[1] - 1, device=bounds.device).expand(len(bounds), -1)
    inside = torch.searchsorted(stops, cut.contiguous(), right=True)
    start, stop = starts.gather(1, inside), stops.gather(1, inside)
    gain = sums.saved(start, cut) + sums.saved(cut, stop) - alone.gather(1, inside)
    most, at = gain.max(1, keepdim=True)
    together = sums.saved(starts[:, :-1].contiguous(), stops[:, 1:].contiguous())
    loss = alone[:, :-1] + alone[:, 1:] - together
    split, pair = inside.gather(1, at), torch.arange(loss.shape[1], device=bounds.device)
    loss = torch.where((pair == split) | (pair + 1 == split), torch.inf, loss)
    least, missed = loss.min(1, keepdim=True)
    pays = most > least + 1e-12 * alone.sum(1, keepdim=True)
    place = torch.where(pays, at + 1, bounds.gather(1, missed + 1))
    return bounds.scatter(1, missed + 1, place).sort(1).values


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


def _edges(table: Float[Tensor, "rows levels"]) -> Float[Tensor, "rows edges"]:
    return ((table[:, 1:] + table[:, :-1]) / 2).contiguous()
