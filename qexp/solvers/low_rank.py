"""Low-rank correction of a solver's error: a product of two thin factors."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.common.errors import UserError, check_choice, check_int, check_number
from qexp.grid import IntGrid
from qexp.grid.scale import DTYPES
from qexp.packed.coded import Coded
from qexp.packed.low_rank import Factor, LowRank
from qexp.solvers.base import Moments, Solution, Solver
from qexp.solvers.factor import inverse_factor
from qexp.solvers.wrapper import Wrapper

METRICS = ("identity", "diagonal", "full")
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
    2410.09615) or all of it.
    factors: dtype of both factors, or symmetric integers in groups of 128.
    damp: share of the mean diagonal added to that of M.
    rounds: of solver and factors. After the first, the solver rounds W - A B, and the factors are
    those of its new error; the best round is kept. SLiM's code rounds again and keeps its factors,
    which are then no longer the best ones.
    """

    rank: float | int = 0.1
    metric: str = "full"
    factors: str = "float16"
    damp: float | int = 0.01
    rounds: int = 1

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

    def stored(self, factor: Float[Tensor, "rank length"]) -> Factor:
        """The factor as storage holds it."""
        if self.factors in DTYPES:
            return factor.to(DTYPES[self.factors])
        length = factor.shape[1]
        size = next(size for size in range(min(GROUP, length), 0, -1) if length % size == 0)
        grid = IntGrid(CODES[self.factors], symmetric=True, group_size=size, scale_dtype="float16")
        return Coded.of(grid, factor.float(), grid.scales_of(factor.float()))


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
        rank = correction.rank_of(*weight.shape)
        product = torch.zeros_like(weight)
        found: list[tuple[float, Solution]] = []
        for _ in range(correction.rounds):
            extra: dict[str, Tensor | Moments] = {} if moments is None else {"moments": moments}
            if first is not None:
                extra["first"] = first - product
            base = self.base(weight - product, hessian, **extra)
            aim = self.base.aim(weight, moments)
            error = (aim - base.packed.dequantize()).double().masked_fill(factor.dead, 0)
            outputs, inputs = nearest_product(error, factor.upper, rank)
            parts = correction.stored(outputs.T.contiguous()), correction.stored(inputs)
            packed = LowRank(base.packed, *parts)
            solution = Solution(
                packed.dequantize(), packed.bits(), packed, max(base.damp, factor.damp)
            )
            change = (solution.weight - aim).double()
            found.append((float(((change @ hessian.double()) * change).sum()), solution))
            product = solution.weight - base.packed.dequantize()
        return min(found, key=lambda each: each[0])[1]


def nearest_product(
    error: Float[Tensor, "rows columns"], upper: Float[Tensor, "columns columns"], rank: int
) -> tuple[Float[Tensor, "rows rank"], Float[Tensor, "rank columns"]]:
    """A and B with the least tr((E - A B) M (E - A B)ᵀ), for M⁻¹ = Uᵀ U with `upper` = U.

    With R = U⁻¹ it is the truncated singular value decomposition of E R, times U; what remains is
    the sum of the squares of the singular values that are left out. Singular values are shared
    evenly between A and B. In float64.
    """
    upper = upper.double()
    weighted = torch.linalg.solve_triangular(upper, error.double(), upper=True, left=False)
    left, values, right = torch.linalg.svd(weighted, full_matrices=False)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, (root[:, None] * right[:rank]) @ upper
