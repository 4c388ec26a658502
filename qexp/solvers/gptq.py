"""GPTQ / OPTQ (Frantar et al., 2210.17323): column-wise rounding with error compensation."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from qexp.common.errors import UserError, check_bool, check_int, check_number
from qexp.grid import Grid, Scale
from qexp.packed.coded import Coded
from qexp.solvers.base import Moments, Solution
from qexp.solvers.factor import damped, ordered
from qexp.solvers.importance import check_importance, importance_of
from qexp.solvers.refine import check_refit, refined
from qexp.solvers.rtn import OnGrid, check_fits_groups
from qexp.solvers.sweep import of_columns, sweep
from qexp.solvers.target import shift


@dataclass(frozen=True)
class GPTQ(OnGrid):
    """Rounds column by column; each error is spread over the remaining columns.

    damp: share of the mean diagonal added to the diagonal (reference 0.01).
    act_order: columns by descending diagonal of the Hessian.
    backwards: the last column of the order comes first, as in QuIP's code.
    clip_first: values beyond the ends of their grid move to them before the sweep, which then does
    not compensate for what is cut off (QuIP's code); needs static_groups.
    static_groups: scales of all groups fitted before the sweep, in the matrix' own column order;
    otherwise on weights that carry the errors of the columns before. Without act_order
    and groups it makes no difference.
    fit_every: columns after which those errors are passed on. The reference fits a group on the
    weights as its block of 128 began; 1 fits on the latest ones.
    block: columns finished before the rest is updated; no effect on the result.
    importance: weighs the errors in range estimation: null, "diagonal" or "obs" (`importance_of`).
    descend, refit: passes of coordinate descent after the sweep, and whether scales and zero points
    are solved after it (`refined`), in the damped Hessian.
    carry: alpha of GPTAQ (2504.02692): each column also passes on, to the columns after it, how its
    input differs from the float model's. 0 is GPTQ.
    """

    grid: Grid
    damp: float = 0.01
    act_order: bool = False
    static_groups: bool = False
    fit_every: int = 128
    block: int = 128
    backwards: bool = False
    clip_first: bool = False
    carry: float | int = 0.0
    importance: str | None = None
    descend: int = 0
    refit: bool = False

    def __post_init__(self) -> None:
        check_bool("method.solver", self, "backwards", "clip_first", "refit")
        if self.clip_first and not self.static_groups:
            raise UserError(
                "method.solver.clip_first=true: the ends are known before the sweep only with "
                "method.solver.static_groups=true."
            )
        if not self.static_groups:
            check_fits_groups(self.grid, "give method.solver.static_groups=true")
        check_number("method.solver", self, damp=0, carry=0)
        check_int("method.solver", self, fit_every=1, block=1, descend=0)
        check_importance(self)
        if self.refit:
            check_refit(self.grid)

    @property
    def needs_moments(self) -> bool:
        return self.carry > 0

    @property
    def takes_first(self) -> bool:
        return True

    def aim(
        self, target: Float[Tensor, "rows columns"], moments: Moments | None
    ) -> Float[Tensor, "rows columns"]:
        if moments is None or not self.carry:
            return target
        return target + shift(target, moments, self.damp)

    def __call__(
        self,
        weight: Float[Tensor, "rows columns"],
        hessian: Float[Tensor, "columns columns"],
        moments: Moments | None = None,
        first: Float[Tensor, "rows columns"] | None = None,
    ) -> Solution:
        """first: values from which a column is rounded where it is the sweep's first one."""
        target, columns = weight.float(), weight.shape[1]
        size = columns // self.grid.groups(columns)
        weight, factor, order, place = ordered(
            weight, hessian, self.damp, self.act_order, self.backwards
        )
        importance = importance_of(
            self.importance, hessian.diagonal()[order], factor.upper.diagonal()
        )
        fitted: list[Scale] = []
        if self.static_groups:
            counts = importance(weight, 0)
            static = self.grid.scales_of(
                weight[:, place], None if counts is None else counts[:, place]
            )
            # One contiguous row per group.
            scales, zeros = static.scale.T.contiguous(), static.zero.T.contiguous()
            if self.clip_first:
                weight = self.grid.clip(weight, static.map(lambda part: part[:, order // size]))

            def fit(values: Tensor, start: int) -> tuple[Tensor, ...]:
                group = order[start : start + size] // size
                return of_columns(scales, group), of_columns(zeros, group)
        else:

            def fit(values: Tensor, start: int) -> tuple[Tensor, ...]:
                q = self.grid.fit(values, importance(values, start))
                fitted.append(q.map(lambda part: part.expand(len(values), 1)))
                return q.scale.T, q.zero.T

        def nearest(w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
            return self.grid.round(w, Scale(scale, zero))

        carry = None
        if moments is not None and self.carry:
            moved = (moments.cross - moments.own)[order][:, order].masked_fill(factor.dead, 0)
            carry = self.carry * (moved @ factor.upper.T).triu(1) @ factor.upper
        swept = sweep(
            weight,
            factor.upper,
            fit,
            nearest,
            size,
            self.block,
            fit_every=self.fit_every,
            carry=carry,
            opening=None if first is None else first[:, order[0]].float(),
        )
        rounded = swept.rounded[:, place]
        if self.static_groups:
            packed = Coded.of(self.grid, rounded, static)
        else:
            found = Scale.join(fitted)
            scattered = (self.act_order or self.backwards) and size < columns
            packed = Coded.of(self.grid, rounded, found, place // size if scattered else None)
        if self.descend or self.refit:
            aim = self.aim(target, moments).masked_fill(factor.dead[place], 0)
            metric = damped(hessian, factor.damp)
            packed = refined(packed, aim, metric, self.descend, self.refit, self.act_order)
        return Solution(packed.dequantize(), packed.bits(), packed, factor.damp)
