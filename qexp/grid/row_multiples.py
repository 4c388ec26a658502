"""Second-level scales along the inputs: whole multiples of one scale per row (DGQ, 2310.04836)."""

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.grid.base import Grid
from qexp.grid.scale import Scale

TRIED = 80


def row_multiples(
    grid: Grid,
    second: Grid,
    q: Scale,
    x: Float[Tensor, "rows columns"],
    counts: Float[Tensor, "rows columns"] | None = None,
    tried: int = TRIED,
) -> Scale:
    """Scales [rows, groups] k · s with whole k ≥ 1 and one s per row, nearest to those of `q`.

    k is so small that |code - zero| · k ≤ 2^(b-1) - 1 for every code, b the bits of `second`: then
    the weights of a row are b-bit integers times s. s is the one of `tried` numbers, from the
    row's largest scale downwards, with the least squared error of the row's weights, each
    times its entry of `counts`. `raw` of the result holds s in place of the scale.
    """
    rows, groups = q.scale.shape
    values, zero = x.reshape(rows, groups, -1), q.zero[:, :, None]
    weights = 1.0 if counts is None else counts.reshape(values.shape)
    top = float(2 ** (second.bits - 1) - 1)
    most = (top / torch.maximum(q.zero, grid.top - q.zero)).floor().clamp(min=1)
    used = values.abs().amax(2) > 0  # the scale of a group of zeros is arbitrary
    used |= ~used.any(1, keepdim=True)
    largest = q.scale.masked_fill(~used, 0).amax(1, keepdim=True)
    least = torch.full_like(largest, torch.inf)
    best, unit = q.scale, largest
    for divisor in torch.linspace(1, top / 2 ** (grid.bits - 1), tried).tolist():
        own = second.as_stored(largest / divisor)
        scale = (q.scale / own).round().clamp(min=1).minimum(most) * own
        change = grid.round(values, Scale(scale[:, :, None], zero)) - values
        error = (change.square() * weights).sum((1, 2))[:, None]
        better = error < least
        least = torch.where(better, error, least)
        best, unit = torch.where(better, scale, best), torch.where(better, own, unit)
    return Scale(best, q.zero, (unit.expand(rows, groups), q.zero))
