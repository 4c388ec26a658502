"""The column loop that every error-compensating solver shares.

Notation of the GPTQ paper (2210.17323), section 3: columns are rounded one after another, and the
error of each is spread over the columns still to come through U, the upper Cholesky factor of the
inverse Hessian (H⁻¹ = Uᵀ U).
"""

from collections.abc import Callable
from math import ceil, gcd

import torch
from jaxtyping import Float
from torch import Tensor

# (values of a column, its index) → its rounded values. One per group of columns.
Rule = Callable[[Float[Tensor, " rows"], int], Float[Tensor, " rows"]]
# (values of the columns of a group as the sweep left them, first index) → the group's rule.
Fit = Callable[[Float[Tensor, "rows size"], int], Rule]


def sweep(
    weight: Float[Tensor, "rows columns"],
    factor: Float[Tensor, "columns columns"],
    fit: Fit,
    group: int,
    block: int = 128,
    within: bool = True,
    fit_every: int = 1,
) -> Float[Tensor, "rows columns"]:
    """Round column by column, spreading each error over the columns to come.

    fit: called once per `group` of columns with their values by then: at the group's first column,
    or, with `fit_every`, at the last multiple of so many columns before it.
    block: columns finished before the rest hears of their errors; run time, never the result.
    within: whether columns inside a block hear of each other's errors (BiLLM's do not).
    """
    columns = weight.shape[1]
    window = max(group, fit_every)
    if group < columns:
        # Whoever is fitted must have heard of every error before: fits happen where a block starts.
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
        rest[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return out.T.contiguous()


def descend(
    weight: Float[Tensor, "rows columns"],
    rounded: Float[Tensor, "rows columns"],
    hessian: Float[Tensor, "columns columns"],
    nearest: Rule,
    block: int = 128,
) -> Float[Tensor, "rows columns"]:
    """One pass of coordinate descent on tr(Δ H Δᵀ) over the values of a grid, from the last column
    to the first as QuIP's: each takes those `nearest` to its best while the others stay, which
    never makes the objective greater. (QuIP's code clamps after the pass, and may.)

    block: columns finished before the rest hears of their steps; run time, never the result.
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
