"""PB-LLM (Shang et al., 2310.00034), post-training part: salient weights in 8 bits, the others
binarized."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.common.errors import UserError, check_bool, check_choice, check_int, check_number
from qexp.grid import IntGrid, Scale
from qexp.grid.scale import DTYPES
from qexp.packed.binary import Binary, Halves
from qexp.packed.coded import Coded
from qexp.packed.mixed import Partial
from qexp.solvers.base import Solution, Solver
from qexp.solvers.billm import Binarize
from qexp.solvers.binarization import METRICS, ascending, two_values
from qexp.solvers.factor import inverse_factor
from qexp.solvers.sweep import of_columns, sweep


@dataclass(frozen=True)
class PBLLM(Solver):
    """GPTQ's sweep, in which salient weights take the nearest value of `grid` and the others one of
    two values per row: mean ± mean absolute deviation (alpha).

    salient: largest share of salient weights: those of a group with the highest metric.
    salient_metric: "hessian", w² / U_jj², or "magnitude", |w|.
    group_size: columns per group, for which salient weights and the two values per row are chosen
    when the sweep reaches it; null: the whole row, as in the paper.
    grid: of the salient weights, fitted on the float matrix (8 bits, one scale per row).
    damp: share of the mean diagonal added to the diagonal.
    scale_dtype: of stored means and alphas.
    block: columns per lazy batch update; affects speed only.
    feedback: whether errors are spread over later columns.

    salient_as_zeros: salient weights count as zeros in the mean and the distance, as in the
    reference, whose distance is too small by their share; otherwise they are left out.
    """

    grid: IntGrid = IntGrid(8)  # noqa: RUF009 (frozen)
    salient: float = 0.1
    salient_metric: str = "hessian"
    group_size: int | None = None
    damp: float = 0.01
    scale_dtype: str = "float32"
    block: int = 128
    feedback: bool = True
    salient_as_zeros: bool = False

    def __post_init__(self) -> None:
        check_number("method.solver", self, salient=0, damp=0)
        if self.salient >= 1:
            raise UserError(f"method.solver.salient={self.salient}: give a share below 1.")
        check_int("method.solver", self, block=1)
        check_bool("method.solver", self, "salient_as_zeros")
        check_choice("method.solver", self, salient_metric=METRICS, scale_dtype=DTYPES)

    def check(self, rows: int, columns: int) -> None:
        self.grid.check(rows, columns)
        if self.group_size is not None and (self.group_size < 1 or columns % self.group_size):
            raise UserError(
                f"method.solver.group_size={self.group_size} does not divide the {columns} inputs "
                "of a layer: choose a divisor, or null for the whole row."
            )

    @property
    def rowwise(self) -> bool:
        return False  # salient weights are chosen among all rows

    @property
    def baseline(self) -> Solver:
        return Binarize(self.group_size or 2**31, self.scale_dtype)

    def __call__(
        self,
        weight: Float[Tensor, "rows columns"],
        hessian: Float[Tensor, "columns columns"],
    ) -> Solution:
        columns = weight.shape[1]
        size = self.group_size or columns
        factor = inverse_factor(hessian, self.damp)
        diagonal = factor.upper.diagonal()
        weight = weight.float().masked_fill(factor.dead, 0)
        scales = self.grid.scales_of(weight)
        each = columns // scales.scale.shape[1]
        salient = torch.zeros(columns, len(weight), dtype=torch.bool, device=weight.device)
        middles: list[Tensor] = []
        levels: list[Tensor] = []
        dtype = getattr(torch, self.scale_dtype)

        def fit(values: Tensor, first: int) -> tuple[Tensor, ...]:
            group = slice(first, first + size)
            metric = values.abs()
            if self.salient_metric == "hessian":
                metric = metric / diagonal[group]
            most = ascending(metric.flatten())[-1 - int(self.salient * metric.numel())]
            salient[group] = (metric > most).T  # ties are not salient, as in the reference
            low = ~salient[group].T
            counted, among = values, low
            if self.salient_as_zeros:
                counted, among = values.masked_fill(~low, 0), torch.ones_like(low)
            mean, reach, _ = two_values(counted, among, dtype)
            levels.append(torch.cat([mean, reach], 1).to(dtype))
            middles.append(mean.expand_as(values))
            group_of = torch.arange(first, first + values.shape[1], device=values.device) // each
            own = (of_columns(part, group_of) for part in (scales.scale.T, scales.zero.T))
            ends = (part.T for part in (mean, mean - reach, mean + reach))
            return salient[group], *own, *ends

        def rounding(
            w: Tensor,
            salient: Tensor,
            scale: Tensor,
            zero: Tensor,
            middle: Tensor,
            less: Tensor,
            more: Tensor,
        ) -> Tensor:
            binary = torch.where(w >= middle, more, less)
            return torch.where(salient, self.grid.round(w, Scale(scale, zero)), binary)

        upper = factor.upper if self.feedback else diagonal.diag()
        rounded, current = sweep(weight, upper, fit, rounding, size, self.block)
        signs = current >= torch.cat(middles, 1)
        binary = Binary(size, Halves(signs), torch.stack(levels, 1))
        packed = Partial(salient.T.contiguous(), Coded.of(self.grid, rounded, scales), binary)
        share = float(salient.float().mean())
        paper = share * self.grid.bits + (1 - share)
        return Solution(packed.dequantize(), packed.bits(), packed, factor.damp, paper)
