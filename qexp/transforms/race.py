"""Search for the candidate with the least error over all data, dropping others as data come."""

from collections.abc import Callable, Sequence
from math import inf, sqrt

import torch
from jaxtyping import Float, Int
from torch import Tensor

# (candidate, parts of the data) → for each of these parts its errors on the samples, such as tokens
Errors = Callable[[int, Sequence[int]], list[Tensor]]

SAMPLES = 256  # that a standard error needs at least where parts are not mixed
# By which the ratio of two candidates' errors is expected to vary between such parts, in addition
# to what the parts show, and after the first of them, which shows nothing.
DRIFT, UNSEEN = 0.005, 0.2
LOSS = 0.002  # candidates whose errors differ by this share are equal
MIXED, SMALLEST = 128, 64  # parts that `mixed` makes at most, and samples of each at least


def mixed(sizes: Float[Tensor, " samples"]) -> list[Int[Tensor, " part"]]:
    """The indices of independent samples, in parts: first the largest 64th of them, then the others
    in random order."""
    order = sizes.argsort(descending=True, stable=True)
    largest, others = order.tensor_split([max(len(order) // 64, 1)])
    if not len(others):
        return [largest]
    mixing = torch.randperm(len(others), generator=torch.Generator().manual_seed(0))
    count = min(max(len(others) // SMALLEST, 1), MIXED)
    return [largest, *others[mixing.to(others.device)].tensor_split(count)]


def least(
    errors: Errors,
    candidates: int,
    parts: int,
    margin: float,
    largest_first: bool = False,
) -> int:
    """The index of the candidate with the least sum of errors over all parts, the first of equals.

    A race (Maron and Moore, 1994): each round measures half as many parts as were measured before.
    Then candidates are dropped that can be better than the best one by no more than LOSS, within
    `margin` standard errors of the difference, extrapolated to all parts. Errors are compared on
    the same samples, so that the variance between samples cancels.

    margin: inf measures every candidate on every part. largest_first: the parts are those of
    `mixed`. The first has most of the error, so every candidate is measured on it; the others are a
    random sample. Otherwise samples of a part belong together, such as the tokens of a sequence, so
    that the standard error counts parts too, and needs SAMPLES.
    """
    first = [0] if largest_first else []
    others = sorted(range(len(first), parts), key=lambda part: part * 0.618034 % 1)
    order, measured, sampled = first + others, 0, 0
    found: dict[int, list[Tensor]] = {index: [] for index in range(candidates)}
    while measured < parts and len(found) > 1:
        more = len(others) if margin == inf else max(1, sampled // 2)
        sampled = min(sampled + more, len(others))
        asked = order[measured : len(first) + sampled]
        for index, seen in found.items():
            seen += [each.double().cpu() for each in errors(index, asked)]
        measured += len(asked)
        if measured < parts:
            found = _left(found, len(first), len(others), margin)
    return min(found, key=lambda index: _total(found[index]))


def _left(
    found: dict[int, list[Tensor]], first: int, others: int, margin: float
) -> dict[int, list[Tensor]]:
    """The candidates that may have the least error. The first parts of each are certain, those
    after them a sample of the others."""
    sampled = {index: seen[first:] for index, seen in found.items()}
    count = len(next(iter(sampled.values())))
    scale, missing = others / count, 1 - count / others
    totals = {i: _total(seen[:first]) + scale * _total(sampled[i]) for i, seen in found.items()}
    best = min(totals, key=lambda index: totals[index])
    if not first and sum(map(len, sampled[best])) < SAMPLES:
        return found
    share = UNSEEN if count == 1 else DRIFT * sqrt(missing / count)
    drift = 0.0 if first else share * _total(sampled[best])

    def slack(index: int) -> float:
        ratio = totals[index] / totals[best] if totals[best] > 0 else 0.0
        pairs = zip(sampled[index], sampled[best], strict=True)
        residuals = [one - ratio * other for one, other in pairs]
        variance = _variance(torch.cat(residuals))
        if not first:
            variance += _variance(torch.stack([part.sum() for part in residuals]))
        return scale * (margin * sqrt(variance * missing) + drift)

    limit = totals[best] * (1 - LOSS)
    return {i: seen for i, seen in found.items() if i == best or totals[i] <= limit + slack(i)}


def _variance(residuals: Tensor) -> float:
    """Of the sum of residuals, whose mean is about 0."""
    count = len(residuals)
    return float(residuals.square().sum()) * count / max(count - 1, 1)


def _total(seen: list[Tensor]) -> float:
    return float(sum(part.sum() for part in seen))
