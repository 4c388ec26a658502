"""BiLLM's searches (2402.04291) for salient columns and for the break-point of a block."""

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

METRICS = ("hessian", "magnitude")  # of saliency: w² / U_jj², or |w|
SPLITS = 81  # break-points tried, at the quantiles 0.10 … 0.90
TILE = 256  # rows per tile, so that a tile fits into the CPU's cache


def two_values(
    values: Float[Tensor, "rows size"], mask: Bool[Tensor, "#rows size"], dtype: torch.dtype
) -> tuple[Float[Tensor, "rows 1"], Float[Tensor, "rows 1"], Bool[Tensor, "rows size"]]:
    """Mean and mean absolute deviation (alpha) of each row's masked values, rounded to `dtype`, 0
    where there are none; and whether each value is at or above the mean."""
    count = mask.sum(1, keepdim=True).clamp(min=1)
    mean = stored(values.masked_fill(~mask, 0).sum(1, keepdim=True) / count, dtype)
    deviation = values - mean
    alpha = stored(deviation.abs().masked_fill_(~mask, 0).sum(1, keepdim=True) / count, dtype)
    return mean, alpha, deviation >= 0


def stored(numbers: Float[Tensor, "rows 1"], dtype: torch.dtype) -> Float[Tensor, "rows 1"]:
    """The numbers rounded to their stored dtype, in float32."""
    return numbers.to(dtype).float()


def salient_columns(searched: Float[Tensor, "rows size"], most: int) -> int:
    """Number of leading columns, 1 … most - 1, to binarize separately for the least squared error.

    In this search both parts are binarized twice.
    """
    counts = range(1, max(most, 2))
    errors = torch.zeros(len(counts), dtype=torch.float64, device=searched.device)
    for tile in searched.split(TILE):
        columns = tile.T.contiguous()  # [size, rows]: adjacent columns are contiguous
        for index, count in enumerate(counts):
            for part in (columns[:count], columns[count:]):
                if len(part):
                    errors[index] += residual_binarization(part)
    return counts[int(errors.argmin())]


def residual_binarization(columns: Float[Tensor, "size rows"]) -> Float[Tensor, ""]:
    """Squared error of binarizing each row (here a column) and then its residual."""
    residual = columns - columns.mean(0)
    alpha = residual.abs().mean(0)
    residual -= torch.copysign(alpha, residual)
    residual -= residual.mean(0)
    residual.abs_()
    residual -= residual.mean(0)  # distance from the alpha of the second order
    return torch.linalg.vector_norm(residual).double().square()


def break_point(
    importance: Float[Tensor, "rows size"],
    searched: Float[Tensor, "rows size"],
    salient: Bool[Tensor, " size"],
) -> float:
    """The |importance| that splits the weights of non-salient columns into two groups per row, for
    the least squared error of binarizing both.

    The error of binarizing n values is Σ v² - n (mean² + alpha²): only the last term is compared.
    """
    magnitude = importance.abs()
    shares = torch.linspace(0.1, 0.9, SPLITS, device=importance.device)
    splits = quantiles(magnitude.masked_fill(salient, 0).flatten(), shares)
    others = ~salient
    if searched is importance:
        explained = explained_sorted(importance[:, others], splits)
    else:
        explained = explained_masked(searched[:, others], magnitude[:, others], splits)
    return float(splits[int(explained.argmax())])


def quantiles(values: Float[Tensor, " count"], shares: Float[Tensor, " shares"]) -> Tensor:
    """Quantiles by linear interpolation. (`torch.quantile` is limited to 2^24 values.)"""
    values = ascending(values)
    at = shares.double() * (len(values) - 1)
    below = at.floor().long()
    above = (below + 1).clamp(max=len(values) - 1)
    return torch.lerp(values[below], values[above], (at - below).float())


def ascending(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Sorted along the last axis; on a CPU by numpy, which sorts twenty times faster."""
    if values.is_cpu:
        return torch.from_numpy(np.sort(values.numpy()))
    return values.sort().values


def explained_sorted(
    values: Float[Tensor, "rows size"], splits: Float[Tensor, " splits"]
) -> Float[Tensor, " splits"]:
    """Σ n (mean² + alpha²) over rows and both groups, |v| ≤ split and |v| > split, for each split.

    In a sorted row a group is one interval or two, so all sums are differences of cumulative sums.
    """
    values = ascending(values).double()
    rows, size = values.shape
    sums = torch.cat([values.new_zeros(rows, 1), values.cumsum(1)], 1)
    bounds = splits.double().expand(rows, -1).contiguous()
    stop = torch.searchsorted(values, bounds, right=True)
    start = torch.searchsorted(values, -bounds) if bool(values[:, 0].min() < 0) else 0 * stop
    first, last = torch.zeros_like(stop), torch.full_like(stop, size)

    def explained(intervals: list[tuple[Tensor, Tensor]]) -> Tensor:
        count = torch.stack([b - a for a, b in intervals]).sum(0)
        total = torch.stack([sums.gather(1, b) - sums.gather(1, a) for a, b in intervals]).sum(0)
        mean = total / count.clamp(min=1)
        middle = torch.searchsorted(values, mean)
        distance = torch.zeros_like(mean)
        for a, b in intervals:
            m = middle.clamp(a, b)
            at = sums.gather(1, m)
            distance += (m - a) * mean - (at - sums.gather(1, a))
            distance += sums.gather(1, b) - at - (b - m) * mean
        return (total.square() + distance.square()) / count.clamp(min=1)

    outer = [(first, start), (stop, last)]
    return (explained([(start, stop)]) + explained(outer)).sum(0)


def explained_masked(
    values: Float[Tensor, "rows size"],
    sizes: Float[Tensor, "rows size"],
    splits: Float[Tensor, " splits"],
) -> Float[Tensor, " splits"]:
    """The same for groups split by `sizes` that are not monotonic in the values: one pass per
    split."""
    explained = torch.zeros(len(splits), dtype=torch.float64, device=values.device)
    for index, split in enumerate(splits):
        for mask in (sizes <= split, sizes > split):
            count = mask.sum(1, keepdim=True)
            mean, alpha, _ = two_values(values, mask, torch.float32)
            explained[index] += (count * (mean.square() + alpha.square())).sum()
    return explained
