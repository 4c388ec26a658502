"""Search for the candidate with the least error over all data, dropping others as data come."""

from collections.abc import Callable, Sequence
from math import inf, sqrt

import torch
from torch import Tensor

# (candidate, parts of the data) → for each of these parts its errors on the samples, such as tokens
Errors = Callable[[int, Sequence[int]], list[Tensor]]

SAMPLES, PARTS = 256, 2  # that a standard error needs at least
DRIFT = 0.005  # by which the ratio of two candidates' errors is expected to vary between parts


def least(errors: Errors, candidates: int, parts: int, margin: float) -> int:
    """The index of the candidate with the least sum of errors over all parts, the first of equals.

    A race (Maron and Moore, 1994): each time a quarter more of the parts are measured, from PARTS
    parts and SAMPLES samples on, candidates are dropped whose error so far exceeds the least one by
    more than `margin` standard errors and what DRIFT explains. Both shrink as parts are measured,
    and compare errors on the same samples, so that what samples differ in counts for nothing. Only
    a candidate that behaves otherwise on the other parts is lost.

    margin: inf measures every candidate on every part.
    """
    order = sorted(range(parts), key=lambda part: part * 0.618034 % 1)  # neighbours far apart
    found: dict[int, list[Tensor]] = {index: [] for index in range(candidates)}
    start = 0
    while start < parts and len(found) > 1:
        stop = parts if margin == inf else min(start + max(1, start // 4), parts)
        for index, seen in found.items():
            seen += [each.double().cpu() for each in errors(index, order[start:stop])]
        best = found[_first_least(found)]
        if PARTS <= stop < parts and sum(map(len, best)) >= SAMPLES:
            found = {
                index: seen
                for index, seen in found.items()
                if _total(seen) - _total(best) <= _slack(seen, best, parts, margin)
            }
        start = stop
    return _first_least(found)


def _first_least(found: dict[int, list[Tensor]]) -> int:
    return min(found, key=lambda index: _total(found[index]))


def _total(seen: list[Tensor]) -> float:
    return float(sum(part.sum() for part in seen))


def _slack(one: list[Tensor], best: list[Tensor], parts: int, margin: float) -> float:
    """What Σ one - Σ best may come to by chance in some of `parts` parts, drawn without
    replacement, if both have the same sum over all of them.

    Its variance is that of residuals one - ratio · best, of samples and of whole parts.
    """
    total, measured = _total(best), len(best)
    ratio = _total(one) / total if total > 0 else 0.0
    residuals = [a - ratio * b for a, b in zip(one, best, strict=True)]
    variance = 0.0
    for values in (torch.cat(residuals), torch.stack([part.sum() for part in residuals])):
        count = len(values)
        variance += float(values.square().sum()) * count / max(count - 1, 1)
    missing = 1 - measured / parts
    return margin * sqrt(variance * missing) + DRIFT * total * sqrt(missing / measured)
