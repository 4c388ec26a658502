"""The column loop that every error-compensating solver shares.

Notation of the GPTQ paper (2210.17323), section 3: columns are rounded one after another, and the
error of each is spread over the columns still to come through U, the upper Cholesky factor of the
inverse Hessian (H⁻¹ = Uᵀ U).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from math import ceil, gcd
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qexp.packed import Packed

# (values of a column, its index) → its rounded values. One per group of columns.
Rule = Callable[[Float[Tensor, " rows"], int], Float[Tensor, " rows"]]
# (values of the columns of a group as the sweep left them, first index) → the group's rule.
Fit = Callable[[Float[Tensor, "rows size"], int], Rule]


class Solution(NamedTuple):
    """A rounded matrix and its stored form.

    damp: the damping that was needed, as a share of the mean diagonal; 0 where none is used.
    paper_bits: average bits as the method's own paper counts them, where that is another number.
    """

    weight: Float[Tensor, "rows columns"]
    bits: float
    packed: Packed
    damp: float = 0.0
    paper_bits: float | None = None


class Solver(ABC):
    @abstractmethod
    def __call__(
        self,
        weight: Float[Tensor, "rows columns"],
        hessian: Float[Tensor, "columns columns"],
    ) -> Solution:
        """Round `weight` so that tr(Δ H Δᵀ) is small. The result does not depend on H's scale."""

    @abstractmethod
    def check(self, rows: int, columns: int) -> None:
        """UserError when a [rows, columns] matrix does not fit the settings."""

    @property
    @abstractmethod
    def rowwise(self) -> bool:
        """Whether each row's result depends on that row and H alone, so that matrices which share
        an input may be solved as one stacked matrix."""

    @property
    @abstractmethod
    def baseline(self) -> "Solver":
        """Rounding to nearest on the same grid: what the result must not be worse than."""

    @property
    def slack(self) -> float:
        """By which share the calibrated error may exceed the baseline's all the same."""
        return 1e-3


class Factor(NamedTuple):
    """upper: U with (H + damp·mean(diag H)·I)⁻¹ = Uᵀ U, float32, dead columns given diagonal 1.
    dead: inputs never seen, whose weights GPTQ sets to 0."""

    upper: Float[Tensor, "columns columns"]
    dead: Bool[Tensor, " columns"]
    damp: float


class Ordered(NamedTuple):
    """A matrix as the sweep takes its columns. weight: in that order, 0 for unseen inputs.
    order: which column comes when; place: when each column comes."""

    weight: Float[Tensor, "rows columns"]
    factor: Factor
    order: Int[Tensor, " columns"]
    place: Int[Tensor, " columns"]


class NotPositiveDefinite(ValueError):
    """A Hessian that no damping up to ten times its mean diagonal makes factorable, or one that
    holds NaN or infinity."""


def damped(
    hessian: Float[Tensor, "columns columns"], damp: float
) -> Float[Tensor, "columns columns"]:
    """H with 1 on the diagonal of unseen inputs and `damp` times its mean added to all."""
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damp * diagonal.mean()
    return hessian


def inverse_factor(hessian: Float[Tensor, "columns columns"], damp: float) -> Factor:
    """Factor the damped inverse. When float32 fails, float64; then ten times the damping.

    Reversing rows and columns turns the lower factor of H into an upper one, R with H = R Rᵀ, and
    U = R⁻¹: one factorization and one triangular inverse, and no explicit H⁻¹.
    """
    if not hessian.isfinite().all():
        raise NotPositiveDefinite("its entries are not all finite")
    dead = hessian.diagonal() == 0
    tried = damp
    while True:
        for dtype in (torch.float32, torch.float64):
            matrix = damped(hessian, tried).to(dtype).flip(0, 1)
            lower, failed = torch.linalg.cholesky_ex(matrix)
            if failed == 0:
                eye = torch.eye(len(matrix), dtype=dtype, device=matrix.device)
                upper = torch.linalg.solve_triangular(lower, eye, upper=False).flip(0, 1).float()
                if upper.isfinite().all():
                    return Factor(upper, dead, tried)
        tried = max(10 * tried, 1e-4)
        if tried > 10:
            raise NotPositiveDefinite("it is not positive definite even with damping 10")


def ordered(
    weight: Float[Tensor, "rows columns"],
    hessian: Float[Tensor, "columns columns"],
    damp: float,
    act_order: bool,
) -> Ordered:
    """Columns as they stand or, with `act_order`, by descending diagonal of the Hessian."""
    order = torch.arange(weight.shape[1], device=weight.device)
    if act_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    factor = inverse_factor(hessian[order][:, order], damp)
    weight = weight.float()[:, order].masked_fill(factor.dead, 0)
    return Ordered(weight, factor, order, torch.argsort(order))


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
