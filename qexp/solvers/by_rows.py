"""Any solver in a Hessian that differs between groups of rows (GuidedQuant, 2505.07004)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.common.errors import UserError
from qexp.packed.stacked import Stacked
from qexp.solvers.base import Moments, Solution, Solver


@dataclass(frozen=True)
class ByRows(Solver):
    """`solver` on each of `groups` equal groups of adjacent rows, with the group's own Hessian
    [groups, columns, columns]."""

    solver: Solver
    groups: int

    def __call__(
        self,
        weight: Float[Tensor, "rows columns"],
        hessian: Float[Tensor, "groups columns columns"],
        *extra: Moments,
    ) -> Solution:
        parts = [
            self.solver(rows, own, *extra)
            for rows, own in zip(weight.chunk(self.groups), hessian, strict=True)
        ]
        packed = Stacked(tuple(part.packed for part in parts))
        printed = [part.paper_bits for part in parts if part.paper_bits is not None]
        return Solution(
            packed.dequantize(),
            packed.bits(),
            packed,
            max(part.damp for part in parts),
            sum(printed) / len(printed) if printed else None,
        )

    def check(self, rows: int, columns: int) -> None:
        if rows % self.groups:
            raise UserError(
                f"method.hessian.groups={self.groups} does not divide the {rows} outputs of a "
                f"layer: choose a divisor of {rows}, or 1."
            )
        self.solver.check(rows // self.groups, columns)

    @property
    def rowwise(self) -> bool:
        return False

    @property
    def baseline(self) -> Solver:
        return ByRows(self.solver.baseline, self.groups)

    @property
    def needs_moments(self) -> bool:
        return self.solver.needs_moments

    def aim(
        self, target: Float[Tensor, "rows columns"], moments: Moments | None
    ) -> Float[Tensor, "rows columns"]:
        return torch.cat([self.solver.aim(rows, moments) for rows in target.chunk(self.groups)])

    def measure(
        self,
        change: Float[Tensor, "rows columns"],
        hessian: Float[Tensor, "groups columns columns"] | None,
    ) -> float:
        own = [None] * self.groups if hessian is None else hessian
        return sum(map(self.solver.measure, change.chunk(self.groups), own))

    @property
    def tolerance(self) -> float:
        return self.solver.tolerance
