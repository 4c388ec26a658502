"""Column sweep with error compensation, and coordinate descent on the same objective.

Notation of the GPTQ paper (2210.17323), section 3: columns are rounded one after another, and the
error of each is spread over the remaining columns with U, the upper Cholesky factor of the inverse
Hessian (H⁻¹ = Uᵀ U).
"""

from collections.abc import Callable, Mapping
from math import ceil, gcd
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qexp.common.captured import captured

# (values of a column, its index) → its rounded values.
Rule = Callable[[Float[Tensor, " rows"], int], Float[Tensor, " rows"]]
# (values of a column, what `Fit` gives for this column) → its rounded values. It depends on nothing
# else, so that the columns of a block are one function of tensors, which a GPU can replay.
Rounding = Callable[..., Float[Tensor, " rows"]]
# (current values of the columns of a group, first index) → tensors whose first side is the columns
# of the group, or 1 where all have the same.
Fit = Callable[[Float[Tensor, "rows size"], int], tuple[Tensor, ...]]


class Swept(NamedTuple):
    """The rounded matrix, and the values of each column when it was rounded."""

    rounded: Float[Tensor, "rows columns"]
    values: Float[Tensor, "rows columns"]


def sweep(
    weight: Float[Tensor, "rows columns"],
    factor: Float[Tensor, "columns columns"],
    fit: Fit,
    rounding: Rounding,
    group: int,
    block: int = 128,
    within: bool = True,
    fit_every: int = 1,
    carry: Float[Tensor, "columns columns"] | None = None,
    opening: Float[Tensor, " rows"] | None = None,
) -> Swept:
    """Round column by column, spreading each error over the remaining columns.

    fit: called once per `group` of columns with their current values: at the group's first column
    or, with `fit_every`, at the last multiple of this many columns before it.
    block: columns per lazy batch update (GPTQ, section 3.3); affects speed only.
    within: whether errors are spread inside a block (BiLLM does not).
    carry: strictly upper; column j adds row j times its value: in its own block the value before
    it is rounded, in later blocks the rounded one, as GPTAQ's code does. With `carry` the length of
    a block therefore has a small effect.
    opening: what the first column rounds in place of its own values, from which its error is still
    measured.
    """
    columns = weight.shape[1]
    window = max(group, fit_every)
    if group < columns:
        # A fit needs all earlier errors, so it must happen where a block starts.
        block = gcd(block, window) if within else group
    rest = weight.float().T.contiguous()  # [columns, rows]: a column is contiguous
    out = torch.empty_like(rest)
    fitted: dict[int, tuple[Tensor, ...]] = {}
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        here, later = slice(start, stop), slice(stop, None)
        if start % window == 0:
            fitted = {
                first: fit(rest[first : first + group].T, first)
                for first in range(ceil(start / group) * group, min(start + window, columns), group)
            } | {first: own for first, own in fitted.items() if first + group > start}
        errors = torch.empty_like(rest[here])
        _columns(
            (rest[here], out[here], errors),
            factor[here, here],
            _of_block(fitted, range(start, stop), group),
            rounding,
            within,
            None if carry is None or not within else carry[here, here],
            None if start else opening,
        )
        rest[later].addmm_(factor[here, later].T, errors, alpha=-1)
        if carry is not None:
            rest[later].addmm_(carry[here, later].T, out[here])
    return Swept(out.T.contiguous(), rest.T)


@captured
def _columns(
    written: tuple[Float[Tensor, "size rows"], ...],
    /,
    factor: Float[Tensor, "size size"],
    fitted: tuple[Tensor, ...],
    rounding: Rounding,
    within: bool,
    carry: Float[Tensor, "size size"] | None,
    opening: Float[Tensor, " rows"] | None,
) -> None:
    """Round the columns of a block. Written are their values, which are left as they were when they
    were rounded, the rounded columns, and their errors divided by U_jj. No number leaves the
    device."""
    values, out, errors = written
    own = [part.unbind() for part in fitted]
    diagonal = factor.diagonal().unbind()
    rounded = []
    columns = zip(values.unbind(), errors.unbind(), diagonal, strict=True)
    for j, (w, error, pivot) in enumerate(columns):
        chosen = w if opening is None or j else opening
        rounded.append(rounding(chosen, *(part[j] for part in own)))
        torch.sub(w, rounded[j], out=error).div_(pivot)
        if within and j + 1 < len(values):
            values[j + 1 :].addr_(factor[j, j + 1 :], error, alpha=-1)
            if carry is not None:
                values[j + 1 :].addr_(carry[j, j + 1 :], w)
    torch.stack(rounded, out=out)


def _of_block(
    fitted: Mapping[int, tuple[Tensor, ...]], block: range, group: int
) -> tuple[Tensor, ...]:
    """What was fitted for each column of a block."""
    pieces = []
    for first in range(block.start // group * group, block.stop, group):
        inside = slice(max(block.start - first, 0), min(block.stop - first, group))
        count = inside.stop - inside.start
        pieces.append(
            [p.expand(count, *p.shape[1:]) if len(p) == 1 else p[inside] for p in fitted[first]]
        )
    return tuple(
        torch.cat(each) if len(each) > 1 else each[0] for each in zip(*pieces, strict=True)
    )


def of_columns(
    part: Float[Tensor, "groups rows"], group: Int[Tensor, " size"]
) -> Float[Tensor, "each rows"]:
    """The numbers of each column's group; a single row where there is one group only."""
    return part if len(part) == 1 else part[group]


def descend(
    weight: Float[Tensor, "rows columns"],
    rounded: Float[Tensor, "rows columns"],
    hessian: Float[Tensor, "columns columns"],
    nearest: Rule,
    block: int = 128,
) -> Float[Tensor, "rows columns"]:
    """One pass of coordinate descent on tr(Δ H Δᵀ) over the values of a grid.

    From the last column to the first, as in QuIP: each column takes the values `nearest` to its
    optimum while the others are fixed, which never increases the objective. (QuIP's code clamps
    only after the pass, and may increase it.)

    block: columns per lazy batch update; affects speed only.
    """
    out = rounded.float().T.contiguous()  # [columns, rows]: a column is contiguous
    change = out - weight.float().T
    diagonal = hessian.diagonal().unbind()
    dead = (hessian.diagonal() <= 0).tolist()
    for stop in range(len(out), 0, -block):
        start = max(stop - block, 0)
        slopes = hessian[start:stop].float() @ change
        for j in reversed(range(start, stop)):
            if dead[j]:
                continue
            step = nearest(out[j] - slopes[j - start] / diagonal[j], j) - out[j]
            out[j] += step
            change[j] += step
            slopes[: j - start].addr_(hessian[start:j, j], step)
    return out.T.contiguous()
