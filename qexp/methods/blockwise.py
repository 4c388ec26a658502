"""Post-training quantization of weights: every linear of every block, one after another."""

import logging
import time
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qexp.common.errors import UserError, check_int
from qexp.common.progress import bar
from qexp.hessian import AtFloatWeights, CacheableHessian, Hessian
from qexp.hessian.base import ForEachGroup
from qexp.hessian.paired import Paired
from qexp.methods.journal import Finished, Journal
from qexp.methods.write_back import write
from qexp.quantizers.scheme import Activations, quantize_activations
from qexp.solvers import Solver
from qexp.solvers.base import Moments
from qexp.solvers.factor import NotPositiveDefinite
from qexp.solvers.target import Same, Target
from qexp.step import Record, Step
from qexp.task import Batches, Task
from qexp.walk import Block, walk

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Direct(Step):
    """Round weights without looking at data (RTN).

    activations_first: static ranges of activations are fitted to the float model; otherwise to the
    model with rounded weights.
    """

    solver: Solver
    activations: tuple[Activations, ...] | list[Activations] = ()
    activations_first: bool = True

    @torch.no_grad()
    def __call__(self, task: Task, batches: Batches) -> list[Record]:
        check(task, self.solver)
        if self.activations_first:
            quantize_activations(task, self.activations, batches)
        records = []
        for name, linear in bar(list(task.linears().items()), "linears"):
            finite(name, linear)
            start = time.perf_counter()
            eye = torch.eye(linear.in_features, device=linear.weight.device)
            solution = self.solver(linear.weight.detach().float(), eye)
            seconds = time.perf_counter() - start
            records.append(write(name, linear, solution, solution.weight, None, seconds))
        if not self.activations_first:
            quantize_activations(task, self.activations, batches)
        return records


@dataclass(frozen=True)
class Blockwise(Step):
    """Walk the blocks, measure each layer's Hessian, solve, go on (GPTQ's procedure).

    propagate: later layers see the outputs of rounded ones; otherwise every Hessian is the float
    model's, the same for all grids and solvers, and measured once for all jobs.
    chunk: sequences run at a time. null takes all at once where memory allows: one forward in all,
    each linear rounded as its input becomes known. A number bounds memory, at the price of one
    forward per group of linears; results are equal up to the order of summation.
    target: which matrix a layer's solution is to be near, see `qexp.solvers.target`.
    activations_first: static ranges are fitted to the float model, then activations are rounded,
    and Hessians (those at float weights too) are of the rounded inputs that layers will read.
    Otherwise Hessians see float activations, and ranges are fitted to the rounded weights.
    """

    solver: Solver
    hessian: CacheableHessian
    propagate: bool = True
    chunk: int | None = None
    activations: tuple[Activations, ...] | list[Activations] = ()
    activations_first: bool = True
    target: Target = Same()  # noqa: RUF009 (frozen: sharing the default is safe)

    def __post_init__(self) -> None:
        if self.chunk is not None:
            check_int("method", self, chunk=1)
        if self.target.needs_moments and self.solver.needs_moments:
            raise UserError(
                "method.target=asymmetric with method.solver.carry: both correct for the inputs; "
                "give method/target=same, or method.solver.carry=0."
            )
        self.hessian.adapted(self.solver)  # UserError where they do not fit
        if self._is_paired and not self.propagate:
            raise UserError(
                "method.propagate=false: every layer then reads the float model's inputs, from "
                "which method.target=asymmetric and method.solver.carry cannot differ; give "
                "method.propagate=true."
            )

    @torch.no_grad()
    def __call__(self, task: Task, batches: Batches) -> list[Record]:
        check(task, self.effective_solver)
        data = batches()  # before anything is rounded: some recipes run the model
        if self.activations_first:
            quantize_activations(task, self.activations, lambda: data)
        records: list[Record] = []
        journal: Journal | None = None
        paired = Paired(self.effective_hessian) if self._is_paired else None
        for block in walk(task, data, self.chunk):
            if paired is not None:
                paired.observe(block)
            elif self.effective_hessian.is_precomputed:
                block.skip()
            if journal is None:
                journal = Journal({"model": block.origin, "method": repr(self)})
                finished = self._finished(journal, len(task.blocks))
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
        if journal is not None:
            task.workspace.remove_when_done(partial(journal.clear, len(task.blocks)))
        if not self.activations_first:
            quantize_activations(task, self.activations, lambda: data)
        return records

    @property
    def _is_paired(self) -> bool:
        return self.target.needs_moments or self.solver.needs_moments

    def _finished(self, journal: Journal, blocks: int) -> list[Finished]:
        """The blocks that an interrupted run finished, up to where Hessians can be
        taken up again."""
        found: list[Finished] = []
        for index in range(blocks):
            if (block := journal.read(index)) is None:
                break
            found.append(block)
        found = found[
            : len(found)
            // self.effective_hessian.blocks_per_pass
            * self.effective_hessian.blocks_per_pass
        ]
        if found:
            log.info("taken up again at block %d of %d", len(found), blocks)
        return found

    @property
    def effective_hessian(self) -> Hessian:
        """What hands out Hessians."""
        return self.hessian if self.propagate else AtFloatWeights(self.hessian)

    @property
    def effective_solver(self) -> Solver:
        """The solver for what the Hessian's source hands out."""
        return self.hessian.adapted(self.solver)

    def _solve(self, block: Block, for_each_group: ForEachGroup) -> list[Record]:
        """Round the linears of a block.

        The calls nest deeply, because one forward shows all inputs: `for_each_group` → the block's
        forward → a hook of a linear → `on_hessian` → `_write` → the solver → its column loop.
        """
        linears = block.linears
        records: list[Record] = []

        def on_hessian(
            names: tuple[str, ...],
            hessian: Float[Tensor, "..."],
            moments: Moments | None,
        ) -> None:
            for stack in [names] if self.effective_solver.rowwise else [(name,) for name in names]:
                full = [f"{block.name}.{name}" for name in stack]
                records.extend(
                    self._write(full, [linears[name] for name in stack], hessian, moments)
                )

        for_each_group(block, on_hessian)
        return records

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
        solver = self.effective_solver
        start = time.perf_counter()
        weight = torch.cat([linear.weight.detach().float() for linear in linears])
        target = self.target(weight, moments)
        extra = (moments,) if solver.needs_moments else ()
        try:
            solution = solver(target, hessian, *extra)
        except NotPositiveDefinite as reason:
            raise UserError(
                f"{names[0]}: its Hessian cannot be factored: {reason}; give more calibration "
                "sequences (calibration.sequences) or more damping (method.solver.damp)."
            ) from reason
        seconds = time.perf_counter() - start
        nearest = solver.baseline(weight, hessian).weight
        aim = solver.aim(target, moments)
        keep = partial(write, tolerance=solver.tolerance, measure=solver.measure)
        records, row = [], 0
        for name, linear in zip(names, linears, strict=True):
            rows = slice(row, row := row + linear.out_features)
            whole = len(linears) == 1
            packed = solution.packed if whole else solution.packed.rows(rows.start, rows.stop)
            own = solution._replace(weight=solution.weight[rows], bits=packed.bits(), packed=packed)
            share = seconds * linear.out_features / len(weight)
            records.append(keep(name, linear, own, nearest[rows], hessian, share, target=aim[rows]))
        return records


def check(task: Task, solver: Solver) -> None:
    """UserError, before any work, when the solver cannot take one of the model's shapes."""
    for name, linear in task.linears().items():
        try:
            solver.check(linear.out_features, linear.in_features)
        except UserError as reason:
            raise UserError(f"{name}: {reason}") from reason


def finite(name: str, linear: nn.Linear) -> None:
    """UserError when a layer's weights hold NaN or infinity."""
    if not linear.weight.isfinite().all():
        raise UserError(
            f"{name}.weight holds values that are not finite: the model's file is damaged, or was "
            "saved from a diverged run; load another one (model.path, model.id)."
        )
