"""Post-training quantization of weights: every linear of every block, one after another."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qexp.common import numerics
from qexp.common.errors import UserError, check_int
from qexp.common.progress import bar
from qexp.hessian import AtFloatWeights, CacheableHessian, Hessian
from qexp.hessian.base import ForEachGroup, one_sided
from qexp.hessian.paired import Paired
from qexp.methods.checks import check, finite
from qexp.methods.journal import Journal
from qexp.methods.owners import rounded_block
from qexp.methods.write_back import write
from qexp.quantizers.scheme import Activations, quantize_activations
from qexp.solvers import Solver
from qexp.solvers.base import Moments
from qexp.solvers.factor import NotPositiveDefinite
from qexp.solvers.low_rank import Residual, Uncorrected
from qexp.solvers.target import Same, Target, check_together
from qexp.step import Record, Step
from qexp.task import Batch, Batches, Task
from qexp.walk import Block, walk


@dataclass(frozen=True)
class Direct(Step):
    """Round weights without looking at data (RTN).

    activations_first: static ranges of activations are fitted to the float model; otherwise to the
    model with rounded weights.
    residual: what is stored of the error, in the metric of the identity.
    """

    solver: Solver
    activations: tuple[Activations, ...] | list[Activations] = ()
    activations_first: bool = True
    residual: Residual = Uncorrected()  # noqa: RUF009 (frozen: sharing the default is safe)

    @torch.no_grad()
    def __call__(self, task: Task, batches: Batches) -> list[Record]:
        solver = one_sided(self.residual.around(self.solver))
        check(task, lambda _: solver)
        if self.activations_first:
            quantize_activations(task, self.activations, batches)
        records = []
        for name, linear in bar(list(task.linears().items()), "linears"):
            finite(name, linear)
            start = time.perf_counter()
            eye = torch.eye(linear.in_features, device=linear.weight.device)
            weight = linear.weight.detach().float()
            solution = solver(weight, eye)
            seconds = time.perf_counter() - start
            nearest = solution
            if solver.baseline != solver:
                nearest = solver.baseline(weight, eye)
            records.append(write(name, linear, solution, nearest.weight, None, seconds))
        if not self.activations_first:
            quantize_activations(task, self.activations, batches)
        return records


@dataclass(frozen=True)
class Blockwise(Step):
    """Walk the blocks, measure each layer's Hessian, solve, go on (GPTQ's procedure).

    propagate: later layers see the outputs of rounded ones; otherwise every Hessian is the float
    model's, the same for all grids and solvers, and measured once for all jobs.
    chunk: sequences that run at a time; null takes as many as keep activations inside a block below
    64 MiB. Results are equal up to the order of summation.
    target: which matrix a layer's solution is to be near, see `qexp.solvers.target`.
    activations_first: static ranges are fitted to the float model, then activations are rounded,
    and Hessians (those at float weights too) are of the rounded inputs that layers will read.
    Otherwise Hessians see float activations, and ranges are fitted to the rounded weights.
    residual: what is stored of the error of each layer in addition.
    own: solvers of single linears, by full name, in place of `solver`.
    """

    solver: Solver
    hessian: CacheableHessian
    propagate: bool = True
    chunk: int | None = None
    activations: tuple[Activations, ...] | list[Activations] = ()
    activations_first: bool = True
    target: Target = Same()  # noqa: RUF009 (frozen: sharing the default is safe)
    residual: Residual = Uncorrected()  # noqa: RUF009
    own: Mapping[str, Solver] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.chunk is not None:
            check_int("method", self, chunk=1)
        check_together(self.solver, self.target, self.propagate)
        self._fitted(self.solver)  # UserError where they do not fit

    @torch.no_grad()
    def __call__(self, task: Task, batches: Batches) -> list[Record]:
        check(task, self.solver_of)
        data = batches()  # before anything is rounded: some recipes run the model
        if self.activations_first:
            quantize_activations(task, self.activations, lambda: data)
        records, journal = self.rounded(task, data)
        task.workspace.remove_when_done(partial(journal.clear, len(task.blocks)))
        if not self.activations_first:
            quantize_activations(task, self.activations, lambda: data)
        return records

    def solver_of(self, name: str) -> Solver:
        """The solver of a linear, by its full name."""
        return self._fitted(self.own.get(name, self.solver))

    def _fitted(self, solver: Solver) -> Solver:
        """The solver with the residual, in what the Hessian's source hands out: where that differs
        between groups of rows, each group has a residual of its own."""
        return self.hessian.adapted(self.residual.around(solver))

    @torch.no_grad()
    def rounded(self, task: Task, data: list[Batch]) -> tuple[list[Record], Journal]:
        """Round the weights; the journal, which a run that is done clears, answers the same call
        again."""
        records: list[Record] = []
        journal: Journal | None = None
        paired = Paired(self.effective_hessian) if self._is_paired else None
        for block in walk(task, data, self.chunk, divide=self.effective_hessian.divides):
            if paired is not None:
                paired.observe(block)
            elif self.effective_hessian.is_precomputed:
                block.skip()
            if journal is None:
                known = {"model": block.origin, "method": repr(self)}
                journal = Journal(known | numerics.identity(task.device))
                finished = journal.finished(
                    len(task.blocks), self.effective_hessian.blocks_per_pass
                )
                if len(finished) < len(task.blocks):
                    for_each_group = (paired or self.effective_hessian).prepare(block)
            if block.index < len(finished):
                finished[block.index].restore(task)
                records += finished[block.index].records
                continue
            solved = self._solve(block, for_each_group)
            journal.write(block.index, solved)
            records += solved
        if len(records) != (expected := len(task.linears())):
            raise RuntimeError(
                f"{len(records)} linears were quantized, not the {expected} asked for"
            )
        assert journal is not None
        return records, journal

    @property
    def _is_paired(self) -> bool:
        return self.target.needs_moments or self.solver.needs_moments

    @property
    def effective_hessian(self) -> Hessian:
        """What hands out Hessians."""
        return self.hessian if self.propagate else AtFloatWeights(self.hessian)

    def _solve(self, block: Block, for_each_group: ForEachGroup) -> list[Record]:
        """Round the linears of a block.

        The calls nest deeply, because one forward shows all inputs: `for_each_group` → the block's
        forward → a hook of a linear → `on_hessian` → `_write` → the solver → its column loop.
        """

        def solve(
            linears: Mapping[str, nn.Linear], hessian: Tensor, moments: Moments | None
        ) -> list[Record]:
            records = []
            for stack in self._stacks(linears):
                records += self._write(stack, [linears[name] for name in stack], hessian, moments)
            return records

        waits = self._is_paired or self.effective_hessian.is_own_moment
        return rounded_block(block, for_each_group, solve, waits)

    def _stacks(self, names: Iterable[str]) -> list[list[str]]:
        """Names of linears that are solved as one matrix: those of equal solvers, if these take
        each row by itself."""
        stacks: list[list[str]] = []
        for name in names:
            solver = self.solver_of(name)
            for stack in stacks:
                if solver.rowwise and self.solver_of(stack[0]) == solver:
                    stack.append(name)
                    break
            else:
                stacks.append([name])
        return stacks

    def _write(
        self,
        names: list[str],
        linears: list[nn.Linear],
        hessian: Float[Tensor, "..."],
        moments: Moments | None,
    ) -> list[Record]:
        """Solve matrices that share a Hessian as one stacked matrix."""
        for name, linear in zip(names, linears, strict=True):
            finite(name, linear)
        if not hessian.isfinite().all() or not hessian.any():
            state = "all zero" if not hessian.any() else "not finite"
            raise UserError(
                f"{names[0]}: its calibration inputs are {state}; check the model's weights and "
                "the calibration text (calibration.corpus)."
            )
        solver = self.solver_of(names[0])
        start = time.perf_counter()
        weight = torch.cat([linear.weight.detach().float() for linear in linears])
        target = self.target(weight, moments)
        extra: dict[str, Any] = {"moments": moments} if solver.needs_moments else {}
        if self.target.gives_first:
            extra["first"] = self.target.first(weight, moments)
        try:
            solution = solver(target, hessian, **extra)
        except NotPositiveDefinite as reason:
            raise UserError(
                f"{names[0]}: its Hessian cannot be factored: {reason}; give more calibration "
                "sequences (calibration.sequences) or more damping (method.solver.damp)."
            ) from reason
        seconds = time.perf_counter() - start
        nearest = solver.baseline(weight, hessian).weight
        aim = solver.aim(target, moments)
        records, row, tolerance = [], 0, solver.tolerance
        for name, linear in zip(names, linears, strict=True):
            rows = slice(row, row := row + linear.out_features)
            whole = len(linears) == 1
            packed = solution.packed if whole else solution.packed.rows(rows.start, rows.stop)
            own = solution._replace(weight=solution.weight[rows], bits=packed.bits(), packed=packed)
            share = seconds * linear.out_features / len(weight)
            write_own = partial(write, name, linear, own, nearest[rows], hessian, share)
            records.append(write_own(tolerance, aim[rows], solver.measure))
        return records
