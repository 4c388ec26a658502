"""The search for the interval with the least error of rounding, row by row."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.grid.base import Grid, Interval

# Numbers that are searched at a time on the CPU, 1 MiB. Temporary tensors of tens of MiB are new
# memory at every operation, which is slower (`qexp bench ranges weight/range=mse`).
PART = 2**18

Trials = Callable[[Tensor, Tensor], Iterable[Interval]]


def least_error(
    full: Interval,
    trials: Trials,
    x: Float[Tensor, "rows size"],
    grid: Grid,
    counts: Float[Tensor, "rows size"] | None,
    norm: float,
) -> Interval:
    """For each row the first interval with the least sum |x - Q(x)|^norm, among those that `trials`
    makes of the `full` intervals of some rows."""
    # rows whose scales are rounded together are searched together
    parts = x.device.type == "cpu" and not grid.second_level
    rows = max(PART // max(x.shape[1], 1), 1) if parts else max(len(x), 1)
    found = []
    for start in range(0, max(len(x), 1), rows):
        place = slice(start, start + rows)
        weights = None if counts is None else counts[place]
        low, high = (end[place] for end in full)
        found.append(_of_part((low, high), trials(low, high), x[place], grid, weights, norm))
    low, high = (torch.cat(ends) for ends in zip(*found, strict=True))
    return low, high


def _of_part(
    full: Interval,
    tried: Iterable[Interval],
    x: Float[Tensor, "rows size"],
    grid: Grid,
    counts: Float[Tensor, "rows size"] | None,
    norm: float,
) -> Interval:
    best = torch.full((len(x), 1), torch.inf, device=x.device)
    best_low, best_high = full
    groups = [second.group_size for second in grid.second_level.values()]
    apart = all(size is not None and len(x) % size == 0 for size in groups)
    together = max(PART // max(x.numel(), 1), 1) if apart else 1
    waiting = iter(tried)
    while trials := list(islice(waiting, together)):  # one below the other, for fewer operations
        count = len(trials)
        low, high = (torch.cat(ends) for ends in zip(*trials, strict=True))
        values = _repeated(x, count)
        error = (grid.round(values, grid.scale_for(low, high)) - values).abs_()
        faster = x.device.type == "cpu" and norm != 2  # than pow, by about half
        error = error.log2_().mul_(norm).exp2_() if faster else error.pow_(norm)
        if counts is not None:
            error = error * _repeated(counts, count)
        least, low, high = _first_least(error.sum(1).view(count, -1), low, high)
        better = least < best
        best = torch.where(better, least, best)
        best_low = torch.where(better, low, best_low)
        best_high = torch.where(better, high, best_high)
    return best_low, best_high


def _repeated(x: Float[Tensor, "rows size"], count: int) -> Float[Tensor, "repeated size"]:
    """x below itself; x itself, without a copy, once."""
    return x.expand(count, *x.shape).reshape(-1, x.shape[1])


def _first_least(
    error: Float[Tensor, "trials rows"], *ends: Float[Tensor, "trials*rows 1"]
) -> list[Float[Tensor, "rows 1"]]:
    """For each row the least error, and the ends of the first trial that has it."""
    count = len(error)
    least = error.amin(0)
    order = torch.arange(count, device=error.device)[:, None].expand_as(error)
    first = order.masked_fill(error != least, count).amin(0, keepdim=True)
    first = first.clamp(max=count - 1)  # of NaN there is no least
    return [least[:, None], *(end.view_as(error).gather(0, first).T for end in ends)]


def multiples(factors: Iterable[float]) -> Trials:
    """Trials that are the full interval times each factor, in order."""
    each = list(factors)

    def trials(low: Tensor, high: Tensor) -> Iterator[Interval]:
        return ((low * factor, high * factor) for factor in each)

    return trials
