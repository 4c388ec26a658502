"""Where a block of weights parts before it is binarized: BiLLM's two searches (2402.04291)."""

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

METRICS = ("hessian", "magnitude")  # of what makes a weight salient: w² / U_jj², or |w|
SPLITS = 81  # break-points tried, at the quantiles 0.10 … 0.90
TILE = 256  # rows searched at a time, so that a tile stays in the processor's cache


def two_values(
    values: Float[Tensor, "rows size"], mask: Bool[Tensor, "#rows size"], dtype: torch.dtype
) -> tuple[Float[Tensor, "rows 1"], Float[Tensor, "rows 1"], Bool[Tensor, "rows size"]]:
    """Mean and mean distance from it of each row's masked values (0 where there are none), as
    `dtype` keeps them, and on which side of the mean each value lies."""
    count = mask.sum(1, keepdim=True).clamp(min=1)
    mean = stored(values.masked_fill(~mask, 0).sum(1, keepdim=True) / count, dtype)
    away = values - mean
    reach = stored(away.abs().masked_fill_(~mask, 0).sum(1, keepdim=True) / count, dtype)
    return mean, reach, away >= 0


def stored(numbers: Float[Tensor, "rows 1"], dtype: torch.dtype) -> Float[Tensor, "rows 1"]:
    return numbers.to(dtype).float()


def salient_columns(searched: Float[Tensor, "rows size"], most: int) -> int:
    """How many of the first columns, 1 … most - 1, to binarize twice apart from the others (which
    are binarized twice too here), for the least square error."""
    counts = range(1, max(most, 2))
    errors = torch.zeros(len(counts), dtype=torch.float64, device=searched.device)
    for tile in searched.split(TILE):
        columns = tile.T.contiguous()  # [size, rows]: any run of columns is one piece of memory
        for index, count in enumerate(counts):
            for part in (columns[:count], columns[count:]):
                if len(part):
                    errors[index] += residual_binarization(part)
    return counts[int(errors.argmin())]


def residual_binarization(columns: Float[Tensor, "size rows"]) -> Float[Tensor, ""]:
    """Square error of binarizing each row (here: column) and then its residual."""
    away = columns - columns.mean(0)
    reach = away.abs().mean(0)
    away -= torch.copysign(reach, away)
    away -= away.mean(0)
    away.abs_()
    away -= away.mean(0)  # distance from the reach of the second order
    return torch.linalg.vector_norm(away).double().square()


def break_point(
    importance: Float[Tensor, "rows size"],
    searched: Float[Tensor, "rows size"],
    salient: Bool[Tensor, " size"],
) -> float:
    """The |importance| that parts the other columns' weights into two groups per row, for the least
    square error of binarizing both.

    Binarizing n values leaves Σ v² - n (mean² + reach²): only the last term is compared.
    """
    magnitude = importance.abs()
    shares = torch.linspace(0.1, 0.9, SPLITS, device=importance.device)
    splits = quantiles(magnitude.masked_fill(salient, 0).flatten(), shares)
    others = ~salient
    if searched is importance:
        kept = explained_sorted(importance[:, others], splits)
    else:
        kept = explained_masked(searched[:, others], magnitude[:, others], splits)
    return float(splits[int(kept.argmax())])


def quantiles(values: Float[Tensor, " count"], shares: Float[Tensor, " shares"]) -> Tensor:
    """Interpolated linearly. (torch's own refuses more than 2^24 values.)"""
    values = ascending(values)
    at = shares.double() * (len(values) - 1)
    below = at.floor().long()
    above = (below + 1).clamp(max=len(values) - 1)
    return torch.lerp(values[below], values[above], (at - below).float())


def ascending(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Sorted along the last axis; on a CPU by numpy, whose sort is twenty times faster."""
    if values.is_cuda:
        return values.sort().values
    return torch.from_numpy(np.sort(values.numpy()))


def explained_sorted(
    values: Float[Tensor, "rows size"], splits: Float[Tensor, " splits"]
) -> Float[Tensor, " splits"]:
    """Σ n (mean² + reach²) over rows and both groups, |v| ≤ split and |v| > split, for each split.

    In a sorted row a group is one run or two, so all sums are differences of running sums.
    """
    values = ascending(values).double()
    rows, size = values.shape
    sums = torch.cat([values.new_zeros(rows, 1), values.cumsum(1)], 1)
    bounds = splits.double().expand(rows, -1).contiguous()
    stop = torch.searchsorted(values, bounds, right=True)
    start = torch.searchsorted(values, -bounds) if bool(values[:, 0].min() < 0) else 0 * stop
    ends = torch.zeros_like(stop), torch.full_like(stop, size)

    def moments(runs: list[tuple[Tensor, Tensor]]) -> Tensor:
        count = torch.stack([b - a for a, b in runs]).sum(0)
        total = torch.stack([sums.gather(1, b) - sums.gather(1, a) for a, b in runs]).sum(0)
        mean = total / count.clamp(min=1)
        middle = torch.searchsorted(values, mean)
        distance = torch.zeros_like(mean)
        for a, b in runs:
            m = middle.clamp(a, b)
            at = sums.gather(1, m)
            distance += (m - a) * mean - (at - sums.gather(1, a))
            distance += sums.gather(1, b) - at - (b - m) * mean
        return (total.square() + distance.square()) / count.clamp(min=1)

    outer = [(ends[0], start), (stop, ends[1])]
    return (moments([(start, stop)]) + moments(outer)).sum(0)


def explained_masked(
    values: Float[Tensor, "rows size"],
    sizes: Float[Tensor, "rows size"],
    splits: Float[Tensor, " splits"],
) -> Float[Tensor, " splits"]:
    """The same where groups are parted by `sizes` that do not grow with the values: one pass per
    split."""
    kept = torch.zeros(len(splits), dtype=torch.float64, device=values.device)
    for index, split in enumerate(splits):
        for mask in (sizes <= split, sizes > split):
            count = mask.sum(1, keepdim=True)
            mean, reach, _ = two_values(values, mask, torch.float32)
            kept[index] += (count * (mean.square() + reach.square())).sum()
    return kept
