"""SparseGPT (Frantar and Alistarh, 2301.00774): pruning in GPTQ's sweep, with or without a grid."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qexp.common.errors import (
    UserError,
    check_bool,
    check_choice,
    check_int,
    check_number,
    check_range,
)
from qexp.grid import Grid, Scale
from qexp.grid.scale import DTYPES
from qexp.packed.coded import Coded
from qexp.packed.masked import Masked
from qexp.packed.plain import Plain
from qexp.solvers.base import Solution, Solver
from qexp.solvers.factor import inverse_factor
from qexp.solvers.sweep import of_columns, sweep

SCORES = ("obs", "wanda", "magnitude")


@dataclass(frozen=True)
class SparseGPT(Solver):
    """GPTQ's sweep, in which the weights of lowest score become 0 and the others are rounded.

    Errors move to later columns only: kept weights to the left of a pruned one do not change.

    grid: of the kept weights, fitted on the dense matrix; null: they stay floating-point values.
    sparsity: share of the weights that become 0.
    pattern: [n, m], n of every m adjacent weights of a row are kept; replaces `sparsity`, `block`
    and `per_row`. null: none.
    score: "obs", w² / U_jj²; "wanda" (2306.11695), |w| √H_jj; or "magnitude", |w|; of the weights
    as they are when the sweep reaches their block.
    update: whether errors are spread over later columns. Wanda is score=wanda update=false
    per_row=true block=null.
    block: columns whose weights are compared; null: all of a row.
    per_row: whether each row loses the same share of a block; otherwise rows end with different
    shares, as in the reference.
    damp: share of the mean diagonal added to the diagonal.
    dtype: of kept weights without a grid.

    The reference prunes one weight more per block, since its threshold is inclusive.
    """

    grid: Grid | None
    sparsity: float | int = 0.5
    pattern: tuple[int, int] | list[int] | None = None
    score: str = "obs"
    update: bool = True
    block: int | None = 128
    per_row: bool = False
    damp: float = 0.01
    dtype: str = "float16"

    def __post_init__(self) -> None:
        check_range(
            "method.solver", self, "a share from 0 to below 1", lambda x: 0 <= x < 1, "sparsity"
        )
        check_choice("method.solver", self, score=SCORES, dtype=DTYPES)
        check_bool("method.solver", self, "update", "per_row")
        check_number("method.solver", self, damp=0)
        if self.block is not None:
            check_int("method.solver", self, block=1)
        if self.pattern is not None and not (
            len(self.pattern) == 2
            and all(type(each) is int for each in self.pattern)
            and 0 < self.pattern[0] <= self.pattern[1]
        ):
            raise UserError(
                f"method.solver.pattern={self.pattern}: give [n, m] with n from 1 to m, such as "
                "[2, 4], or null."
            )

    def check(self, rows: int, columns: int) -> None:
        if self.grid is not None:
            self.grid.check(rows, columns)
        if self.pattern is not None and columns % self.pattern[1]:
            raise UserError(
                f"method.solver.pattern={list(self.pattern)} does not divide the {columns} inputs "
                "of a layer: choose a divisor for its second number, or null."
            )

    @property
    def rowwise(self) -> bool:
        alone = self.per_row or self.pattern is not None
        return alone and (self.grid is None or self.grid.rowwise)

    @property
    def baseline(self) -> Solver:
        return replace(self, score="magnitude", update=False)

    @property
    def tolerance(self) -> float:
        """Without update 1, since no score then knows of correlations between inputs: on some
        layer that of |w| may err less."""
        return 1e-3 if self.update else 1.0

    def __call__(
        self,
        weight: Float[Tensor, "rows columns"],
        hessian: Float[Tensor, "columns columns"],
    ) -> Solution:
        rows, columns = weight.shape
        factor = inverse_factor(hessian, self.damp)
        weight = weight.float().masked_fill(factor.dead, 0)
        diagonal = factor.upper.diagonal()
        importance = {
            "obs": 1 / diagonal,
            "wanda": hessian.diagonal().sqrt(),
            "magnitude": torch.ones_like(diagonal),
        }[self.score]
        size = min(self.pattern[1] if self.pattern else self.block or columns, columns)
        kept = torch.ones(columns, rows, dtype=torch.bool, device=weight.device)
        dtype = getattr(torch, self.dtype)
        scales = None if self.grid is None else self.grid.scales_of(weight)

        def fit(values: Tensor, first: int) -> tuple[Tensor, ...]:
            group = slice(first, first + size)
            pruned = self._pruned(values.abs() * importance[group]).T
            kept[group] = ~pruned
            if scales is None:
                return (pruned,)
            number = torch.arange(first, first + values.shape[1], device=values.device)
            number = number * scales.scale.shape[1] // columns
            own = (of_columns(part, number) for part in (scales.scale.T, scales.zero.T))
            return pruned, *own

        def rounding(w: Tensor, pruned: Tensor, *own: Tensor) -> Tensor:
            if self.grid is None:
                return w.to(dtype).to(w.dtype).masked_fill(pruned, 0)
            return self.grid.round(w, Scale(own[0], own[1])).masked_fill(pruned, 0)

        upper = factor.upper if self.update else diagonal.diag()
        rounded = sweep(weight, upper, fit, rounding, size).rounded
        if self.grid is None or scales is None:
            inside: Plain | Coded = Plain(rounded.to(dtype))
        else:
            inside = Coded.of(self.grid, rounded, scales)
        mask = kept.T.contiguous()
        packed = Masked(mask, inside)
        paper = 1 + inside.entry_bits * float(mask.float().mean())
        return Solution(packed.dequantize(), packed.bits(), packed, factor.damp, paper)

    def _pruned(self, scores: Float[Tensor, "rows size"]) -> Bool[Tensor, "rows size"]:
        """The weights of lowest score, in each row or in all rows together."""
        share = 1 - self.pattern[0] / self.pattern[1] if self.pattern else self.sparsity
        compared = scores if self.per_row or self.pattern else scores.reshape(1, -1)
        lowest = compared.topk(round(share * compared.shape[1]), 1, largest=False).indices
        pruned = torch.zeros_like(compared, dtype=torch.bool).scatter_(1, lowest, True)
        return pruned.reshape(scores.shape)
