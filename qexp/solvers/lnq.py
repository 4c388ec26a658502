"""LNQ (Kim et al., 2505.07004, GuidedQuant's layer-wise non-uniform quantization): tables by least
squares and codes by coordinate descent in turn."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qexp.common.errors import check_int, check_number
from qexp.grid.kmeans import kmeans
from qexp.packed.table import Table
from qexp.solvers.base import Solution
from qexp.solvers.codebook import ascending, least_squares, nearest_codes, onto
from qexp.solvers.squeezellm import OnTable
from qexp.solvers.sweep import descend


class State(NamedTuple):
    """Codes, tables as stored (in float32), and the objective of each row."""

    codes: Int[Tensor, "rows columns"]
    table: Float[Tensor, "rows levels"]
    error: Float[Tensor, " rows"]

    def better(self, other: "State") -> "State":
        """Of each row the one with the lower objective; this one where they are equal."""
        lower = other.error < self.error
        pairs = zip(self, other, strict=True)
        return State(*(torch.where(lower.reshape(-1, *[1] * (x.ndim - 1)), y, x) for x, y in pairs))


@dataclass(frozen=True)
class LNQ(OnTable):
    """Minimizes tr(Δ H Δᵀ) over the tables and codes of rows, from SqueezeLLM's with F = diag H.

    rounds: each is a step on the codes, except in the first round, and one on the tables. A row
    takes a step only where its objective falls, with the table as it is stored.
    cycles: passes of coordinate descent in a step on the codes.
    damp: share of the mean diagonal added to the diagonal (reference 1e-5).
    steps: of the k-means at the start.
    """

    bits: int = 3
    rounds: int = 3
    cycles: int = 4
    damp: float | int = 1e-5
    steps: int = 50
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        self.check_settings()
        check_int("method.solver", self, rounds=0, cycles=1, steps=1)
        check_number("method.solver", self, damp=0)

    @property
    def rowwise(self) -> bool:
        return True

    def __call__(
        self,
        weight: Float[Tensor, "rows columns"],
        hessian: Float[Tensor, "columns columns"],
    ) -> Solution:
        weight = weight.float()
        table = kmeans(weight, hessian.diagonal()[None], 2**self.bits, self.steps)
        dtype = getattr(torch, self.scale_dtype)
        table = table.to(dtype).float()
        codes, table = self.improved(weight, hessian, nearest_codes(weight, table), table)
        packed = Table(self.bits, codes.int(), table.to(dtype))
        return Solution(packed.dequantize(), packed.bits(), packed, self.damp)

    def improved(
        self,
        weight: Float[Tensor, "rows columns"],
        hessian: Float[Tensor, "columns columns"],
        codes: Int[Tensor, "rows columns"],
        table: Float[Tensor, "rows levels"],
    ) -> tuple[Int[Tensor, "rows columns"], Float[Tensor, "rows levels"]]:
        """Codes and tables after all rounds. `table`: ascending, as stored."""
        hessian = hessian.float() / hessian.diagonal().mean()
        hessian = hessian + self.damp * torch.eye(len(hessian), device=hessian.device)
        dtype = getattr(torch, self.scale_dtype)

        def state(codes: Tensor, table: Tensor) -> State:
            change = table.gather(1, codes) - weight
            return State(codes, table, ((change @ hessian) * change).sum(1, dtype=torch.float64))

        best = state(codes, table)
        for turn in range(self.rounds):
            before = best.error
            if turn:
                values, nearest = best.table.gather(1, best.codes), onto(best.table)
                for _ in range(self.cycles):
                    values = descend(weight, values, hessian, nearest)
                best = best.better(state(nearest_codes(values, best.table), best.table))
            fitted = least_squares(weight, hessian, best.codes, best.table).to(dtype).float()
            best = best.better(state(*ascending(best.codes, fitted)))
            if torch.equal(best.error, before):
                break
        return best.codes, best.table
