"""Refinement of a coded matrix after its sweep: coordinate descent on the codes, and least squares
of scales and zero points."""

from dataclasses import replace
from functools import reduce

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qexp.common.errors import UserError
from qexp.grid import Grid, Scale
from qexp.grid.clipping import Clamp
from qexp.packed.coded import Coded
from qexp.solvers.sweep import descend

TILE = 256  # rows solved together
RIDGE = 1e-8  # of the diagonal: codes of a group may all be equal


def refined(
    coded: Coded,
    weight: Float[Tensor, "rows columns"],
    hessian: Float[Tensor, "columns columns"],
    passes: int,
    refit: bool,
    act_order: bool,
) -> Coded:
    """`passes` of coordinate descent with, if wanted, a refit before each and after the last.

    No part raises the objective tr(Δ H Δᵀ). With a refit this is LNQ (in GuidedQuant, 2505.07004)
    on an affine grid instead of a free table.
    """
    for _ in range(passes):
        coded = refitted(coded, weight, hessian) if refit else coded
        coded = descended(coded, weight, hessian, act_order)
    return refitted(coded, weight, hessian) if refit else coded


def descended(
    coded: Coded,
    weight: Float[Tensor, "rows columns"],
    hessian: Float[Tensor, "columns columns"],
    act_order: bool,
    passes: int = 1,
    start: Float[Tensor, "rows columns"] | None = None,
    clamp: Clamp = torch.clamp,
    block: int = 128,
) -> Coded:
    """The codes after passes of coordinate descent (`sweep.descend`); scales do not change.

    act_order: the largest diagonal of H first; otherwise the last column.
    start: where the first pass starts; None: at the codes. clamp: of each step, torch.clamp for the
    bounds of the grid.
    """
    wide = coded.per_column()
    order = torch.arange(weight.shape[1], device=weight.device)
    if act_order:  # `descend` starts at the last column
        order = torch.argsort(hessian.diagonal(), stable=True)

    def nearest(values: Tensor, j: int) -> Tensor:
        scale = Scale(wide.scale[:, order[j]], wide.zero[:, order[j]])
        return coded.grid.round(values, scale, clamp=clamp)

    rounded = (coded.dequantize() if start is None else start)[:, order]
    for _ in range(passes):
        rounded = descend(weight[:, order], rounded, hessian[order][:, order], nearest, block)
    rounded = rounded[:, torch.argsort(order)]
    return replace(coded, codes=coded.grid.encode(rounded, wide).to(torch.int32))


def refitted(
    coded: Coded,
    weight: Float[Tensor, "rows columns"],
    hessian: Float[Tensor, "columns columns"],
) -> Coded:
    """The same codes with the scales and zero points that minimize tr(Δ H Δᵀ), in closed form.

    Least squares in the metric H over all groups of a row. An integer zero point is the rounded
    solution, for which the scales are solved again. A row keeps its old numbers where the new ones,
    as stored, are not better.
    """
    tiles = range(0, len(weight), TILE)
    parts = [
        _refitted(coded.rows(row, min(row + TILE, len(weight))), weight[row : row + TILE], hessian)
        for row in tiles
    ]
    scale, zero = torch.cat([q.scale for q in parts]), torch.cat([q.zero for q in parts])
    return _with(coded, Scale(scale, zero))


def check_refit(grid: Grid) -> None:
    """UserError where the rows of a grid share numbers, or the groups of a row do."""
    if not grid.rowwise or grid.second_level:
        raise UserError(
            "method.solver.refit=true: scales and zero points are solved row by row; give "
            "weight.per_tensor=false weight.scales=null weight.zeros=null."
        )


def _refitted(coded: Coded, weight: Tensor, hessian: Tensor) -> Scale:
    """The refitted scales of one tile of rows."""
    weight, hessian = weight.double(), hessian.double()
    found = [coded, _with(coded, _solved(coded, weight, hessian, offsets=False))]
    if coded.grid.has_zero:
        moved = _with(coded, _solved(coded, weight, hessian, offsets=True))
        found.append(_with(coded, _solved(moved, weight, hessian, offsets=False)))

    def error(each: Coded) -> Tensor:
        gap = weight - each.dequantize().double()
        return (gap @ hessian * gap).sum(1, keepdim=True)

    def better(one: tuple[Tensor, Scale], other: tuple[Tensor, Scale]) -> tuple[Tensor, Scale]:
        wins = other[0] < one[0]
        old, new = one[1], other[1]
        scale, zero = new.scale.where(wins, old.scale), new.zero.where(wins, old.zero)
        return torch.minimum(one[0], other[0]), Scale(scale, zero)

    return reduce(better, [(error(each), each.scales()) for each in found])[1]


def _solved(coded: Coded, weight: Tensor, hessian: Tensor, offsets: bool) -> Scale:
    """Scales, and with `offsets` zero points too, of the least error, as they are stored.

    The unknowns are the change of a group's scale and, with `offsets`, a number that is added to
    its values. A small ridge leaves what the error does not depend on where it is.
    """
    grid, old = coded.grid, coded.scales()
    wide = coded.per_column()
    unit = grid.decode(coded.codes.float(), wide._replace(scale=torch.ones_like(wide.scale)))
    free = _free(coded)
    features = [unit.double() * free] + ([free.double()] if offsets else [])
    groups, count = _groups(coded), old.scale.shape[1]

    def summed(values: Tensor) -> Tensor:
        zeros = torch.zeros(len(values), count, dtype=values.dtype, device=values.device)
        return zeros.index_add_(1, groups, values)

    slope = (weight - coded.dequantize().double()) @ hessian
    right = torch.cat([summed(slope * each) for each in features], 1)
    gram = []
    for feature in features:
        for index in range(count):
            inside = (groups == index).nonzero()[:, 0]
            moved = feature[:, inside] @ hessian[inside]
            gram.append(torch.cat([summed(moved * each) for each in features], 1))
    left = torch.stack(gram, 1)
    diagonal = left.diagonal(dim1=1, dim2=2)
    diagonal += RIDGE * diagonal + (diagonal == 0)
    change = torch.linalg.solve(left, right[..., None])[..., 0]
    raw = old.scale.double() + change[:, :count]
    scale = grid.as_stored(raw.float())
    zero = old.zero
    if offsets:
        shift = change[:, count:] / scale.double()
        zero = grid.zero_as_stored((zero.double() - shift).float())
    return Scale(scale, zero)


def _with(coded: Coded, scales: Scale) -> Coded:
    """The codes with other scales and zero points."""
    return replace(coded, scale=scales.scale, zero=scales.zero if coded.grid.has_zero else None)


def _free(coded: Coded) -> Bool[Tensor, "rows columns"]:
    """The weights that are codes, not outliers."""
    mask = torch.ones_like(coded.codes, dtype=torch.float32)
    if coded.outliers is not None:
        values = torch.zeros_like(coded.outliers.values)
        mask = replace(coded.outliers, values=values).put(mask)
    return mask.bool()


def _groups(coded: Coded) -> Int[Tensor, " columns"]:
    """The group of each column."""
    if coded.group is not None:
        return coded.group
    columns = coded.codes.shape[1]
    count = coded.scales().scale.shape[1]
    return torch.arange(columns, device=coded.codes.device) // (columns // count)
