"""QuIP (Chee et al., 2307.13304): incoherence processing and LDLQ rounding."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.common.errors import check_bool, check_int, check_number
from qexp.grid import Grid
from qexp.packed.coded import Coded
from qexp.packed.rotated import Rotated, rotations
from qexp.solvers.base import Solution, Solver
from qexp.solvers.factor import damped
from qexp.solvers.gptq import GPTQ
from qexp.solvers.importance import check_importance
from qexp.solvers.refine import check_refit, descended, refitted
from qexp.solvers.rtn import RTN, OnGrid


@dataclass(frozen=True)
class QuIP(OnGrid):
    """Incoherence processing, then LDLQ, then greedy passes.

    Inputs are scaled by (H_jj / ‖w_j‖²)^¼, both sides are rotated by random orthogonal matrices and
    permutations, and the result is rounded. LDLQ takes the columns from last to first with the
    factor of H = L D Lᵀ: this is GPTQ's sweep in reversed order (the paper's theorem 6), and after
    a random permutation the reversed order is equally random.

    grid: `weight=quip` is the paper's, 2.4 root mean squares to both sides, one scale per matrix.
    damp: share of the mean diagonal. The reference adds 0.01 twice.
    clip_first: as in the reference, values beyond the grid's bounds are moved to them before
    everything else, so that other columns do not compensate for it, and greedy passes clamp only
    their final result.
    seed: of the rotations. rescale, feedback: whether inputs are rescaled, and errors spread.
    act_order: columns by descending diagonal of the rotated Hessian.
    backwards: LDLQ goes through the columns from last to first, as the reference does.
    greedy: passes that move every weight in turn to its best value while the others stay (see
    `descend`), in the damped Hessian; with act_order the largest diagonal first. The reference's
    default is 0; act_order and some passes (its code: 9) are LDLQ-RG. Without feedback the first
    pass starts at the weights themselves (its `allbal`, with act_order).
    block: columns finished before the rest is updated; no effect on the result.
    importance: of the rotated weights in range estimation, as in GPTQ. refit: as in GPTQ, after the
    greedy passes, for a grid with a scale per row or group.
    """

    grid: Grid
    damp: float = 0.02
    seed: int = 0
    rescale: bool = True
    feedback: bool = True
    act_order: bool = False
    greedy: int = 0
    block: int = 128
    clip_first: bool = False
    backwards: bool = False
    importance: str | None = None
    refit: bool = False

    def __post_init__(self) -> None:
        check_number("method.solver", self, damp=0)
        check_int("method.solver", self, greedy=0, block=1)
        check_bool("method.solver", self, "clip_first", "backwards", "refit")
        check_importance(self)
        if self.refit:
            check_refit(self.grid)

    @property
    def rowwise(self) -> bool:
        return False  # the rotation mixes rows

    @property
    def baseline(self) -> Solver:
        return replace(self, feedback=False, greedy=0, refit=False)

    def __call__(
        self,
        weight: Float[Tensor, "rows columns"],
        hessian: Float[Tensor, "columns columns"],
    ) -> Solution:
        rows, columns = weight.shape
        dead = hessian.diagonal() == 0
        weight = weight.float().masked_fill(dead, 0)
        column_scale = self._input_scale(weight, hessian).masked_fill_(dead, 1)
        outputs, inputs = rotations(rows, columns, self.seed)
        rotated = inputs.apply(weight * column_scale.float())
        rotated = outputs.apply(rotated.T).T.float().contiguous()
        scaled = hessian / column_scale.float() / column_scale.float()[:, None]
        scaled = inputs.apply(inputs.apply(scaled).T).float()
        scaled = (scaled + scaled.T) / 2
        coded, damp = self.solved(rotated, scaled)
        packed = Rotated(coded, self.seed, column_scale)
        return Solution(packed.dequantize(), packed.bits(), packed, damp)

    def solved(
        self,
        weight: Float[Tensor, "rows columns"],
        hessian: Float[Tensor, "columns columns"],
    ) -> tuple[Coded, float]:
        """LDLQ and greedy passes on a matrix that was rotated: codes, and the damping needed."""
        solver = (
            GPTQ(
                self.grid,
                self.damp,
                self.act_order,
                static_groups=self.clip_first,
                fit_every=1,
                block=self.block,
                backwards=self.backwards,
                clip_first=self.clip_first,
                importance=self.importance,
            )
            if self.feedback
            else RTN(self.grid)
        )
        inner = solver(weight, hessian)
        assert isinstance(inner.packed, Coded)
        damp = inner.damp if self.feedback else self.damp
        coded, metric = inner.packed, damped(hessian, damp)
        if self.greedy:
            near = self.grid.clip(weight, coded.per_column()) if self.clip_first else weight
            clamp = (lambda codes, *_: codes) if self.clip_first else torch.clamp
            start = None if self.feedback else near
            coded = descended(
                coded, near, metric, self.act_order, self.greedy, start, clamp, self.block
            )
        return refitted(coded, weight, metric) if self.refit else coded, inner.damp

    def _input_scale(
        self, weight: Float[Tensor, "rows columns"], hessian: Float[Tensor, "columns columns"]
    ) -> Float[Tensor, " columns"]:
        """The scale of each input, as stored: float16, with geometric mean 1."""
        if not self.rescale:
            return torch.ones(weight.shape[1], dtype=torch.float16, device=weight.device)
        tiny = torch.finfo(torch.float32).tiny
        energy = weight.square().sum(0).clamp(min=tiny)
        log = (hessian.diagonal().clamp(min=tiny).log() - energy.log()) / 4
        alive = (hessian.diagonal() > 0) & (energy > tiny)
        mean = log[alive].mean() if alive.any() else 0.0
        return (log - mean).clamp(-9, 9).exp().masked_fill(~alive, 1).half()
