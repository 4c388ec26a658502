"""Weighted k-means in one dimension, for the rows of a matrix."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

# Numbers in a temporary tensor, on a CPU about what fits into its cache.
CHUNK = 2**17


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
    inner = torch.searchsorted(ordered, edges(centres.sort(1).values), right=True)
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


def edges(table: Float[Tensor, "rows levels"]) -> Float[Tensor, "rows edges"]:
    """The midpoints between the entries of each row."""
    return ((table[:, 1:] + table[:, :-1]) / 2).contiguous()
