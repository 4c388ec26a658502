"""Low-rank correction of a solver's error: a product of two thin factors."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.common.errors import UserError, check_choice, check_int, check_number
from qexp.grid import IntGrid
from qexp.grid.scale import DTYPES
from qexp.packed.coded import Coded
from qexp.packed.low_rank import Factor
from qexp.solvers.alternation import alternate, nearest_product
from qexp.solvers.base import Moments, Solution, Solver
from qexp.solvers.factor import inverse_factor
from qexp.solvers.rtn import RTN
from qexp.solvers.wrapper import Wrapper

METRICS = ("identity", "diagonal", "full", "fisher")
CODES = {"int8": 8, "int4": 4}
GROUP = 128  # numbers of a coded factor that share a scale, or the next smaller divisor of its side


class Residual(ABC):
    """What a method stores of its error in addition to the solver's result."""

    @abstractmethod
    def around(self, solver: Solver) -> Solver:
        """The solver that also stores it."""


@dataclass(frozen=True)
class Uncorrected(Residual):
    """Nothing."""

    def around(self, solver: Solver) -> Solver:
        return solver


@dataclass(frozen=True)
class Correction(Residual):
    """A B of rank `rank` with the least tr((E - A B) M (E - A B)ᵀ), where E is the solver's error.

    rank: of the product; below 1 a share of the shorter side of the matrix; 0 leaves it out.
    metric: M is the identity (LoRC: ZeroQuant-V2, 2303.08302), the diagonal of the Hessian (SLiM,
    2410.09615) or all of it. `fisher` weighs the square of each entry of E - A B by the product of
    a number for its row and one for its column: the means over rows and over columns of a diagonal
    for each weight (LQ-LoRA, 2311.12023, section 3.2).
    factors: dtype of both factors, or symmetric integers in groups of 128.
    damp: share of the mean diagonal added to that of M.
    rounds: of solver and factors. After the first, the solver rounds W - A B, and the factors are
    those of its new error; the best round is kept. SLiM's code rounds again and keeps its factors,
    which are then no longer the best ones.
    factors_first: the first round already rounds what the best factors of the whole matrix leave
    (LQ-LoRA; LoftQ, 2310.08659, begins with rounding).
    until_worse: no further round after one whose error is larger than that of the round before.
    """

    rank: float | int = 0.1
    metric: str = "full"
    factors: str = "float16"
    damp: float | int = 0.01
    rounds: int = 1
    factors_first: bool = False
    until_worse: bool = False

    def __post_init__(self) -> None:
        check_number("method.residual", self, rank=0, damp=0)
        if self.rank >= 1 and self.rank % 1:
            raise UserError(
                f"method.residual.rank={self.rank}: give a share below 1, or a whole number."
            )
        check_choice("method.residual", self, metric=METRICS, factors=(*DTYPES, *CODES))
        check_int("method.residual", self, rounds=1)

    def around(self, solver: Solver) -> Solver:
        if not self.rank:
            return solver
        if solver.needs_both_sides:
            raise UserError(
                f"method.residual.rank={self.rank}: {type(solver).__name__} rounds in a Hessian of "
                "the outputs too; give method/residual=none, or another solver."
            )
        if solver.needs_diagonal:
            raise UserError(
                f"method.residual.rank={self.rank}: {type(solver).__name__} rounds in the diagonal "
                "of a Hessian, not in all of it; give method/residual=none, or another solver."
            )
        if self.metric == "fisher":
            if not isinstance(solver, RTN):
                raise UserError(
                    f"method.residual.metric=fisher: {type(solver).__name__} rounds in a matrix of "
                    "inputs, of which the metric has the diagonal; give a method that rounds to "
                    "nearest (method=lq_lora), or metric=full."
                )
            return CorrectedByDiagonal(solver, self)
        return Corrected(solver, self)

    def rank_of(self, rows: int, columns: int) -> int:
        """The rank for a [rows, columns] matrix, at least 1."""
        return int(self.rank) if self.rank >= 1 else max(int(self.rank * min(rows, columns)), 1)

    def weighting(
        self, hessian: Float[Tensor, "columns columns"]
    ) -> Float[Tensor, "columns columns"]:
        """M without damping."""
        if self.metric == "full":
            return hessian
        diagonal = hessian.diagonal()
        return torch.diag(diagonal if self.metric == "diagonal" else torch.ones_like(diagonal))

    def stored(
        self, outputs: Float[Tensor, "rows rank"], inputs: Float[Tensor, "rank columns"]
    ) -> tuple[Factor, Factor]:
        """The factors as storage holds them."""
        return self._stored(outputs.T.contiguous()), self._stored(inputs)

    def _stored(self, factor: Float[Tensor, "rank length"]) -> Factor:
        if self.factors in DTYPES:
            return factor.to(DTYPES[self.factors])
        length = factor.shape[1]
        size = next(size for size in range(min(GROUP, length), 0, -1) if length % size == 0)
        grid = IntGrid(CODES[self.factors], symmetric=True, group_size=size, scale_dtype="float16")
        return Coded.of(grid, factor.float(), grid.scales_of(factor.float()))

    def alternate(
        self,
        aim: Float[Tensor, "rows columns"],
        solve: Callable[[Tensor], Solution],
        factors: Callable[[Tensor], tuple[Factor, Factor]],
        measure: Callable[[Tensor], float],
    ) -> Solution:
        """The best of the rounds, see `alternation.alternate`."""
        flags = self.factors_first, self.until_worse
        return alternate(aim, solve, factors, measure, self.rounds, *flags)


@dataclass(frozen=True)
class Corrected(Wrapper):
    """A solver followed by a `Correction` of its error."""

    correction: Correction

    @property
    def rowwise(self) -> bool:
        return False

    def check(self, rows: int, columns: int) -> None:
        self.base.check(rows, columns)
        if self.correction.rank > (most := min(rows, columns)):
            raise UserError(
                f"method.residual.rank={self.correction.rank}: a [{rows}, {columns}] matrix has "
                f"rank {most} at most; give a share below 1, or at most that."
            )

    def __call__(
        self,
        weight: Float[Tensor, "rows columns"],
        hessian: Float[Tensor, "columns columns"],
        moments: Moments | None = None,
        first: Float[Tensor, "rows columns"] | None = None,
    ) -> Solution:
        correction = self.correction
        factor = inverse_factor(correction.weighting(hessian), correction.damp)
        aim = self.base.aim(weight, moments)

        def solve(product: Tensor) -> Solution:
            extra: dict[str, Tensor | Moments] = {} if moments is None else {"moments": moments}
            if first is not None:
                extra["first"] = first - product
            return self.base(weight - product, hessian, **extra)

        def factors(error: Tensor) -> tuple[Factor, Factor]:
            error = error.double().masked_fill(factor.dead, 0)
            rank = correction.rank_of(*weight.shape)
            return correction.stored(*nearest_product(error, factor.upper, rank))

        def measure(change: Tensor) -> float:
            change = change.double()
            return float(((change @ hessian.double()) * change).sum())

        solution = correction.alternate(aim, solve, factors, measure)
        return solution._replace(damp=max(solution.damp, factor.damp))


@dataclass(frozen=True)
class CorrectedByDiagonal(Wrapper):
    """Round-to-nearest followed by a `Correction` in the metric `fisher`."""

    correction: Correction

    @property
    def rowwise(self) -> bool:
        return False

    @property
    def needs_diagonal(self) -> bool:
        return True

    def check(self, rows: int, columns: int) -> None:
        Corrected(self.base, self.correction).check(rows, columns)

    def __call__(
        self,
        weight: Float[Tensor, "rows columns"],
        hessian: Float[Tensor, "_ columns"],
    ) -> Solution:
        correction = self.correction
        by_row, by_column = (part.sqrt() for part in _sides(hessian, correction.damp))

        def solve(product: Tensor) -> Solution:
            return self.base(weight - product, hessian)

        def factors(error: Tensor) -> tuple[Factor, Factor]:
            upper = torch.diag(1 / by_column)
            rank = correction.rank_of(*weight.shape)
            outputs, inputs = nearest_product(by_row * error.double(), upper, rank)
            return correction.stored(outputs / by_row, inputs)

        def measure(change: Tensor) -> float:
            return self.measure(change, hessian)

        solution = correction.alternate(weight, solve, factors, measure)
        return solution._replace(damp=float(correction.damp))

    def measure(
        self, change: Float[Tensor, "rows columns"], hessian: Float[Tensor, "..."] | None
    ) -> float:
        squares = change.double().square()
        if hessian is not None:
            by_row, by_column = _sides(hessian, self.correction.damp)
            squares = by_row * squares * by_column
        return float(squares.sum())


def _sides(
    diagonal: Float[Tensor, "each columns"], damp: float
) -> tuple[Float[Tensor, "each 1"], Float[Tensor, " columns"]]:
    """The means of a diagonal over columns and over rows, each relative to the mean of all, plus a
    share `damp`: no row and no column counts nothing."""
    diagonal = diagonal.double()
    mean = diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
    least = max(damp, 1e-9)
    return diagonal.mean(1, keepdim=True) / mean + least, diagonal.mean(0) / mean + least
