"""Any solver in a Hessian that differs between groups of rows (GuidedQuant, 2505.07004)."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.common.errors import UserError
from qexp.packed.stacked import Stacked
from qexp.solvers.base import Moments, Solution, Solver
from qexp.solvers.wrapper import Wrapper


@dataclass(frozen=True)
class ByRows(Wrapper):
    """`base` on each of `groups` equal groups of adjacent rows, with the group's own Hessian
    [groups, columns, columns]."""

    groups: int

    def __call__(
        self,
        weight: Float[Tensor, "rows columns"],
        hessian: Float[Tensor, "groups columns columns"],
        first: Float[Tensor, "rows columns"] | None = None,
        **extra: Any,
    ) -> Solution:
        extras = [extra] * self.groups
        if first is not None:
            extras = [extra | {"first": rows} for rows in first.chunk(self.groups)]
        parts = [
            self.base(rows, own, **each)
            for rows, own, each in zip(weight.chunk(self.groups), hessian, extras, strict=True)
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
        self.base.check(rows // self.groups, columns)

    @property
    def rowwise(self) -> bool:
        return False

    @property
    def baseline(self) -> Solver:
        return ByRows(self.base.baseline, self.groups)

    def least_bits(self, rows: int, columns: int) -> float:
        return self.base.least_bits(rows // self.groups, columns)

    def aim(
        self, target: Float[Tensor, "rows columns"], moments: Moments | None
    ) -> Float[Tensor, "rows columns"]:
        return torch.cat([self.base.aim(rows, moments) for rows in target.chunk(self.groups)])

    def measure(
        self,
        change: Float[Tensor, "rows columns"],
        hessian: Float[Tensor, "groups columns columns"] | None,
    ) -> float:
        own = [None] * self.groups if hessian is None else hessian
        return sum(map(self.base.measure, change.chunk(self.groups), own))
