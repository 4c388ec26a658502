"""Column sweep with error compensation, and coordinate descent on the same objective.

Notation of the GPTQ paper (2210.17323), section 3: columns are rounded one after another, and the
error of each is spread over the remaining columns with U, the upper Cholesky factor of the inverse
Hessian (H⁻¹ = Uᵀ U).
"""

from collections.abc import Callable
from math import ceil, gcd

import torch
from jaxtyping import Float
from torch import Tensor

# (values of a column, its index) → its rounded values. One rule per group of columns.
Rule = Callable[[Float[Tensor, " rows"], int], Float[Tensor, " rows"]]
# (current values of the columns of a group, first index) → the rule of the group.
Fit = Callable[[Float[Tensor, "rows size"], int], Rule]


def sweep(
    weight: Float[Tensor, "rows columns"],
    factor: Float[Tensor, "columns columns"],
    fit: Fit,
    group: int,
    block: int = 128,
    within: bool = True,
    fit_every: int = 1,
    carry: Float[Tensor, "columns columns"] | None = None,
) -> Float[Tensor, "rows columns"]:
    """Round column by column, spreading each error over the remaining columns.

    fit: called once per `group` of columns with their current values: at the group's first column
    or, with `fit_every`, at the last multiple of this many columns before it.
    block: columns per lazy batch update (GPTQ, section 3.3); affects speed only.
    within: whether errors are spread inside a block (BiLLM does not).
    carry: strictly upper; column j adds row j times its value: in its own block the value before
    it is rounded, in later blocks the rounded one, as GPTAQ's code does. With `carry` the length of
    a block therefore has a small effect.
    """
    columns = weight.shape[1]
    window = max(group, fit_every)
    if group < columns:
        # A fit needs all earlier errors, so it must happen where a block starts.
        block = gcd(block, window) if within else group
    rest = weight.float().T.contiguous()  # [columns, rows]: a column is contiguous
    out = torch.empty_like(rest)
    rules: dict[int, Rule] = {}
    diagonal = factor.diagonal().tolist()
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        if start % window == 0:
            rules = {
                first: fit(rest[first : first + group].T, first)
                for first in range(ceil(start / group) * group, min(start + window, columns), group)
            } | {first: rule for first, rule in rules.items() if first + group > start}
        errors = torch.empty_like(rest[start:stop])
        for j in range(start, stop):
            out[j] = rules[j // group * group](rest[j], j)
            torch.sub(rest[j], out[j], out=errors[j - start]).div_(diagonal[j])
            if within:
                rest[j + 1 : stop].addr_(factor[j, j + 1 : stop], errors[j - start], alpha=-1)
                if carry is not None:
                    rest[j + 1 : stop].addr_(carry[j, j + 1 : stop], rest[j])
        rest[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
        if carry is not None:
            rest[stop:].addmm_(carry[start:stop, stop:].T, out[start:stop])
    return out.T.contiguous()


def opened(fit: Fit, values: Float[Tensor, " rows"]) -> Fit:
    """`fit` with a rule for the first column of a sweep that rounds `values` instead of the
    column's own; its error is still measured from the latter."""

    def opening(current: Tensor, first: int) -> Rule:
        rule = fit(current, first)
        return lambda w, j: rule(w if j else values, j)

    return opening


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
    diagonal = hessian.diagonal().tolist()
    for stop in range(len(out), 0, -block):
        start = max(stop - block, 0)
        slopes = hessian[start:stop].float() @ change
        for j in reversed(range(start, stop)):
            if diagonal[j] <= 0:
                continue
            step = nearest(out[j] - slopes[j - start] / diagonal[j], j) - out[j]
            out[j] += step
            change[j] += step
            slopes[: j - start].addr_(hessian[start:j, j], step)
    return out.T.contiguous()
