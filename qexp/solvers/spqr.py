"""SpQR (Dettmers et al., 2306.03078): sparse outliers and second-level quantized scales."""

from dataclasses import dataclass, replace
from math import inf

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qexp.common.errors import check_bool, check_choice, check_int, check_number
from qexp.grid import IntGrid, Scale
from qexp.grid.scale import DTYPES
from qexp.packed.coded import Coded
from qexp.packed.outliers import Outliers
from qexp.solvers.base import Solution
from qexp.solvers.factor import damped, ordered
from qexp.solvers.importance import check_importance, importance_of
from qexp.solvers.refine import check_refit, refitted
from qexp.solvers.rtn import OnGrid, check_fits_groups
from qexp.solvers.sweep import sweep


@dataclass(frozen=True)
class SpQR(OnGrid):
    """GPTQ's sweep on a grid that is fitted without outliers; those stay in floating point.

    threshold: a weight is an outlier when its error e² = (w - Q(w))² / U_jj² exceeds `threshold`
    times the mean over columns of Var(w_j) / U_jj². Infinity: no outliers; the grid is fitted on
    all weights.
    grid: its `scales` and `zeros` are the second level. In the reference ranges need not include 0
    and zero points are real numbers (`weight=spqr`).
    damp: share of the mean diagonal (reference default 0.01, its near-lossless recipe 1.0).
    act_order: columns by descending diagonal. Groups then follow that order, and each column's
    group is stored.
    outlier_dtype: of stored outliers, which rounding uses: float32 (the reference computes with it,
    but counts 16 bits), float16 or bfloat16.
    block: columns per lazy batch update; affects speed only.
    importance: of weights in range estimation, as in GPTQ. refit: as in GPTQ; outliers stay, and a
    second level is refused.

    As in the reference, with which results were compared: a group is fitted when the sweep reaches
    its first column, on weights that include all earlier errors. Likely outliers are found with
    scales without a second level and replaced by the mean of the others; then the group's two-level
    grid is fitted. Zero points are computed from scales before the second level. Row statistics
    (grid.scale_dtype) and outliers are float32.
    """

    grid: IntGrid
    threshold: float = 0.2
    damp: float = 0.01
    act_order: bool = False
    outlier_dtype: str = "float32"
    block: int = 128
    importance: str | None = None
    refit: bool = False

    def __post_init__(self) -> None:
        check_number("method.solver", self, threshold=0, damp=0)
        check_int("method.solver", self, block=1)
        check_choice("method.solver", self, outlier_dtype=DTYPES)
        check_bool("method.solver", self, "refit")
        check_fits_groups(self.grid, "give method=gptq, or another grid")
        check_importance(self)
        if self.refit:
            check_refit(self.grid)

    @property
    def rowwise(self) -> bool:
        return self.threshold == inf and self.grid.rowwise

    def __call__(
        self,
        weight: Float[Tensor, "rows columns"],
        hessian: Float[Tensor, "columns columns"],
    ) -> Solution:
        rows, columns = weight.shape
        size = columns // self.grid.groups(columns)
        weight, factor, order, place = ordered(weight, hessian, self.damp, self.act_order)
        diagonal = factor.upper.diagonal()
        importance = importance_of(self.importance, hessian.diagonal()[order], diagonal)
        sparse = self.threshold < inf and rows > 1
        if sparse:
            mean = (weight.var(0) / diagonal.square()).mean().double()
            limit = self.threshold * mean
            # (w - Q(w))² > limit · U_jj², without squaring
            farthest = (limit.sqrt() * diagonal.double()).float()
        plain = replace(self.grid, scales=None, zeros=None)
        outlier_dtype = getattr(torch, self.outlier_dtype)
        fitted: list[Scale] = []

        def fit(values: Tensor, first: int) -> tuple[Tensor, ...]:
            group = slice(first, first + size)
            if sparse:
                gains = gains_alone(values, diagonal[group], plain)
                values = filled(values, gains > limit)
            q = self.grid.fit(values, importance(values, first))
            fitted.append(q)
            return (q.scale.T, q.zero.T, *([farthest[group]] if sparse else []))

        def nearest(w: Tensor, scale: Tensor, zero: Tensor, *far: Tensor) -> Tensor:
            rounded = self.grid.round(w, Scale(scale, zero))
            if not far:
                return rounded
            outlying = outside(w, rounded, far[0])
            return torch.where(outlying, w.to(outlier_dtype).float(), rounded)

        swept = sweep(weight, factor.upper, fit, nearest, size, self.block)
        joined, mask = Scale.join(fitted), None
        if sparse:
            alone = Scale(joined.scale, joined.zero)  # what a column is rounded with in the sweep
            flat = alone.map(lambda part: part.expand(rows, -1).reshape(-1, 1))
            nearest_to = self.grid.round(swept.values.reshape(-1, size), flat)
            outlying = outside(swept.values, nearest_to.reshape(rows, columns), farthest)
            mask = outlying[:, place] if outlying.any() else None
        rounded = swept.rounded[:, place]
        packed = Coded.of(
            self.grid,
            rounded,
            joined,
            place // size if self.act_order and size < columns else None,
            None if mask is None else Outliers.of(rounded, mask, self.outlier_dtype),
        )
        if self.refit:
            metric = damped(hessian, factor.damp)
            packed = refitted(packed, weight[:, place], metric)
        share = 0.0 if mask is None else float(mask.float().mean())
        bits = paper_bits(self.grid, size, share)
        return Solution(packed.dequantize(), packed.bits(), packed, factor.damp, bits)


def outside(w: Tensor, rounded: Tensor, farthest: Tensor) -> Tensor:
    """Which values are farther from their rounded ones than allowed, in broadcastable shapes."""
    return (w - rounded).abs_() > farthest


def gains_alone(
    values: Float[Tensor, "rows size"], diagonal: Float[Tensor, " size"], grid: IntGrid
) -> Float[Tensor, "rows size"]:
    """Decrease of a group's error Σ (w - Q(w))² / U_jj² when one weight is left out of the fit and
    of the sum, for each weight.

    Only leaving out the smallest or the largest weight changes the range, so three fits suffice;
    for the others the gain is their own error.
    """

    def errors(q: Scale) -> Tensor:
        return ((grid.round(values, q) - values) / diagonal).square_()

    low, lowest = values.min(1, keepdim=True)
    high, highest = values.max(1, keepdim=True)
    whole = errors(grid.scale_for(low, high))
    gains = whole.clone()
    total = whole.sum(1, keepdim=True)
    inner_low = values.scatter(1, lowest, inf).amin(1, keepdim=True)
    inner_high = values.scatter(1, highest, -inf).amax(1, keepdim=True)
    for index, q in (
        (lowest, grid.scale_for(inner_low, high)),
        (highest, grid.scale_for(low, inner_high)),
    ):
        remaining = errors(q).scatter_(1, index, 0).sum(1, keepdim=True)
        gains.scatter_(1, index, total - remaining)
    return gains


def filled(
    values: Float[Tensor, "rows size"], mask: Bool[Tensor, "rows size"]
) -> Float[Tensor, "rows size"]:
    """Masked entries replaced by the mean of the row's other entries (0 where there are none)."""
    others = values.masked_fill(mask, 0)
    mean = others.sum(1, keepdim=True) / (~mask).sum(1, keepdim=True).clamp_(min=1)
    return torch.where(mask, mean, values)


def paper_bits(grid: IntGrid, size: int, outliers: float) -> float:
    """Average bits as the SpQR code counts them, without row pointers and column order: 32 bits per
    outlier and two 16-bit numbers per second-level group (four with real zero points).

    size: columns per group. outliers: share of outliers.
    """
    scale = grid.scales.bits if grid.scales is not None else 16
    zero = grid.bits if not grid.real_zero else grid.zeros.bits if grid.zeros is not None else 16
    bits = grid.bits + (scale + (0 if grid.symmetric else zero)) / size + 32 * outliers
    for second in (grid.scales, grid.zeros if grid.real_zero else None):
        if second is not None:
            bits += 32 / (size * (second.group_size or inf))
    return bits
