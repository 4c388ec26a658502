"""BiLLM (Huang et al., 2402.04291): one bit per weight, two in salient columns."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qexp.common.errors import UserError, check_choice, check_int, check_number
from qexp.grid.scale import DTYPES
from qexp.packed.binary import Binary, Halves
from qexp.solvers.base import Solution, Solver
from qexp.solvers.binarization import METRICS, break_point, salient_columns, stored, two_values
from qexp.solvers.factor import inverse_factor
from qexp.solvers.sweep import sweep


@dataclass(frozen=True)
class BiLLM(Solver):
    """Binarizes whole blocks of columns; each block's error is spread over the later blocks.

    In each block a few columns are salient and binarized twice (residual binarization); the other
    weights form two groups per row, of small and of large ones. The number of salient columns and
    the break-point between the groups are searched. Binarized values are mean ± alpha, with alpha
    the mean absolute deviation.

    block: columns binarized together, with a mean and an alpha per row and group.
    damp: share of the mean diagonal added to the diagonal.
    salient_metric: ranks columns and splits groups: "hessian", M = w² / U_jj², or "magnitude", |w|.
    search: the matrix whose binarization error the searches minimize: "importance", M itself (a
    quirk of the reference), or "weight", the matrix that is finally rounded.
    most_salient: upper limit of salient columns in a block, exclusive; at least one is salient.
    scale_dtype: of stored means and alphas, which rounding uses: float32 (the reference), float16
    or bfloat16.
    feedback: how a block's errors change later blocks. "columns" (the reference): as if each
    column's error had been spread before the next column was binarized, which is not the case;
    "block": the optimal change of later columns, given all errors of the block; "none".

    Other quirks of the reference are kept: M uses U's diagonal, not [H⁻¹]_jj; errors are not spread
    inside a block; quantiles for the break-points count salient columns as zeros. Results were
    compared with the reference. One difference: a weight equal to its group's mean takes the upper
    value, since storage has only two signs.
    """

    block: int = 128
    damp: float = 0.01
    salient_metric: str = "hessian"
    search: str = "importance"
    most_salient: int = 50
    scale_dtype: str = "float32"
    feedback: str = "columns"

    def __post_init__(self) -> None:
        check_number("method.solver", self, damp=0)
        check_int("method.solver", self, block=2, most_salient=1)
        check_choice("method.solver", self, salient_metric=METRICS, scale_dtype=DTYPES)
        check_choice("method.solver", self, search=("importance", "weight"))
        check_choice("method.solver", self, feedback=("columns", "block", "none"))

    def check(self, rows: int, columns: int) -> None:
        if columns < 2:
            raise UserError("method=billm needs layers of at least two inputs.")

    @property
    def rowwise(self) -> bool:
        return False  # salient columns and break-points depend on all rows

    @property
    def baseline(self) -> Solver:
        return Binarize(self.block, self.scale_dtype)

    @property
    def tolerance(self) -> float:
        """1: errors inside a block are not compensated, so a small layer may be worse than plain
        binarization. Twice the error of that indicates a broken calibration."""
        return 1.0

    def __call__(
        self,
        weight: Float[Tensor, "rows columns"],
        hessian: Float[Tensor, "columns columns"],
    ) -> Solution:
        factor = inverse_factor(hessian, self.damp)
        diagonal = factor.upper.diagonal()
        halves: list[Halves] = []
        levels: list[Tensor] = []

        def fit(values: Tensor, first: int) -> tuple[Tensor, ...]:
            size = values.shape[1]
            importance = values
            if self.salient_metric == "hessian":
                importance = (values / diagonal[first : first + size]).square()
            searched = values if self.search == "weight" else importance
            order = importance.abs().sum(0).argsort(descending=True, stable=True)
            count = salient_columns(searched[:, order], min(self.most_salient, size))
            salient = torch.zeros(size, dtype=torch.bool, device=values.device)
            salient[order[:count]] = True
            split = break_point(importance, searched, salient)
            high = (importance.abs() > split) & ~salient
            block, numbers = binarized(values, high, salient, getattr(torch, self.scale_dtype))
            halves.append(block)
            levels.append(numbers)
            return (block.decode(numbers).T.contiguous(),)

        weight = weight.float().masked_fill(factor.dead, 0)
        upper = {"columns": factor.upper, "none": diagonal.diag()}.get(self.feedback)
        if upper is None:
            upper = jointly(factor.upper, self.block)
        sweep(weight, upper, fit, lambda _, rounded: rounded, self.block, within=False)
        packed = Binary(self.block, Halves.join(halves), torch.stack(levels, 1))
        assert packed.halves.salient is not None
        paper = 1 + float(packed.halves.salient.float().mean())
        return Solution(packed.dequantize(), packed.bits(), packed, factor.damp, paper)


def jointly(
    upper: Float[Tensor, "columns columns"], block: int
) -> Float[Tensor, "columns columns"]:
    """The factor with which `sweep(within=False)` spreads a block's errors E as E U_bb⁻¹ U_b,later,
    which minimizes tr(Δ H Δᵀ) over the later columns."""
    spread = torch.eye(len(upper), device=upper.device)
    for start in range(0, len(upper) - block, block):
        inside, later = slice(start, start + block), slice(start + block, None)
        spread[inside, later] = torch.linalg.solve_triangular(
            upper[inside, inside], upper[inside, later], upper=True
        )
    return spread


@dataclass(frozen=True)
class Binarize(Solver):
    """Two values per row and block, mean ± mean absolute deviation; ignores the Hessian."""

    block: int = 128
    scale_dtype: str = "float32"

    def check(self, rows: int, columns: int) -> None:
        pass

    @property
    def rowwise(self) -> bool:
        return True

    @property
    def baseline(self) -> Solver:
        return self

    def __call__(
        self,
        weight: Float[Tensor, "rows columns"],
        hessian: Float[Tensor, "columns columns"] | None = None,
    ) -> Solution:
        dtype = getattr(torch, self.scale_dtype)
        halves, levels = [], []
        for values in weight.float().split(self.block, 1):
            everything = torch.ones_like(values, dtype=torch.bool)
            mean, alpha, signs = two_values(values, everything, dtype)
            halves.append(Halves(signs))
            levels.append(torch.cat([mean, alpha], 1).to(dtype))
        packed = Binary(self.block, Halves.join(halves), torch.stack(levels, 1))
        return Solution(packed.dequantize(), packed.bits(), packed, paper_bits=1.0)


def binarized(
    values: Float[Tensor, "rows size"],
    high: Bool[Tensor, "rows size"],
    salient: Bool[Tensor, " size"],
    dtype: torch.dtype,
) -> tuple[Halves, Float[Tensor, "rows 7"]]:
    """A block's signs and levels: first order in both groups, second order in salient columns."""
    low = two_values(values, ~(high | salient), dtype)
    upper = two_values(values, high, dtype)
    first = two_values(values, salient[None], dtype)
    rest = values - first[0] - torch.where(first[2], first[1], -first[1])
    shift = two_values(rest, salient[None], dtype)[0]
    mean = stored(first[0] + shift, dtype)  # the means of both orders are stored as one number
    rest = values - mean - torch.where(first[2], first[1], -first[1])
    count = salient.sum().clamp(min=1)
    second_alpha = stored(rest.abs().masked_fill(~salient, 0).sum(1, keepdim=True) / count, dtype)
    signs = torch.where(salient, first[2], torch.where(high, upper[2], low[2]))
    halves = Halves(signs, high, salient, (rest >= 0) & salient)
    levels = torch.cat([*low[:2], *upper[:2], mean, first[1], second_alpha], 1)
    return halves, levels.to(dtype)
