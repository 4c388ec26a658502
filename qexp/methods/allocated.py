"""Bit allocation: a bit width for every linear, under a budget of stored bits."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qexp.common import on_disk
from qexp.common.errors import UserError, check_positive
from qexp.methods.blockwise import Blockwise
from qexp.methods.checks import check
from qexp.methods.option_costs import Metric
from qexp.quantizers.scheme import Activations, quantize_activations
from qexp.solvers.allocation import OverBudget, Rule
from qexp.solvers.target import Same
from qexp.step import Record, Step
from qexp.task import Batch, Batches, Task

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Allocated(Step):
    """Solve every linear at every option, choose one option for each, and quantize with those.

    options: bit widths, in place of `weight.bits`.
    budget: stored bits per weight over all linears, scales included.
    metric: the cost of a linear at an option. rule: the choice, given costs and sizes.
    quantization: how options are solved, in its Hessians at float weights, and how the model is
    quantized afterwards. Solutions of an option are kept in the cache: other budgets, metrics and
    rules use them.
    """

    options: list[int]
    budget: float | int
    metric: Metric
    rule: Rule
    quantization: Blockwise

    def __post_init__(self) -> None:
        check_positive("method", self, "budget")
        whole = all(type(option) is int and 2 <= option <= 16 for option in self.options)
        if not whole or not self.options or len(set(self.options)) < len(self.options):
            raise UserError(
                f"method.options={self.options}: give different whole numbers from 2 to 16, such "
                "as [2,3,4]."
            )
        if self.quantization.solver.needs_moments:
            raise UserError(
                "method.quantization.solver.carry: options are solved at float weights, where "
                "nothing is carried; give method@method.quantization=gptq."
            )
        for option in self.options:
            self.quantization.solver.with_bits(option)  # UserError where it has no bit width

    @property
    def activations(self) -> Sequence[Activations]:
        return self.quantization.activations

    @torch.no_grad()
    def __call__(self, task: Task, batches: Batches) -> list[Record]:
        self._check(task)
        data = batches()
        first = self.quantization.activations_first
        if first:
            quantize_activations(task, self.activations, lambda: data)
        costs, sizes = self._table(task, data)
        names = list(task.linears())
        try:
            picked = self.rule(costs, sizes, self._bits(task))
        except OverBudget as reason:
            raise self._over(reason.least / self._weights(task)) from reason
        chosen = {name: self.options[at] for name, at in zip(names, picked, strict=True)}
        counts = sorted(Counter(chosen.values()).items())
        log.info("%s", ", ".join(f"{count} linears at {bits} bits" for bits, count in counts))
        solvers = {name: self.quantization.solver.with_bits(chosen[name]) for name in names}
        method = replace(self.quantization, activations=(), own=solvers)
        records = method(task, lambda: data)
        if not first:
            quantize_activations(task, self.activations, lambda: data)
        return [replace(record, option=chosen[record.name]) for record in records]

    def _table(self, task: Task, data: list[Batch]) -> tuple[Tensor, Tensor]:
        """Costs and sizes in bits, [linears, options]. The model ends as it began."""
        linears = task.linears()
        floats = {name: on_disk.like(linear.weight) for name, linear in linears.items()}
        costs, sizes = [], []
        for option in self.options:
            records, _ = self._at(option).rounded(task, data)
            for name, linear in linears.items():
                on_disk.assign(linear.weight, floats[name])
            found = self.metric(task, data, records)
            costs.append(torch.tensor([found[name] for name in linears], dtype=torch.float64))
            by_name = {record.name: record.packed.size() for record in records}
            sizes.append(torch.tensor([by_name[name] for name in linears]))
        return torch.stack(costs, 1), torch.stack(sizes, 1)

    def _at(self, option: int) -> Blockwise:
        """What solves an option: as `quantization`, but every linear in the float model."""
        solver = self.quantization.solver.with_bits(option)
        return replace(
            self.quantization, solver=solver, propagate=False, target=Same(), activations=()
        )

    def _check(self, task: Task) -> None:
        """UserError for shapes that an option cannot take, and for a budget below what every
        solution takes, as far as that is known."""
        methods = [self._at(option) for option in self.options]
        for method in methods:
            check(task, method.solver_of)
        least = 0.0
        for name, linear in task.linears().items():
            rows, columns = linear.weight.shape
            bits = min(method.solver_of(name).least_bits(rows, columns) for method in methods)
            least += bits * rows * columns
        if int(least) > self._bits(task):
            raise self._over(least / self._weights(task))

    def _over(self, least: float) -> UserError:
        up = -(-least * 1e4 // 1) / 1e4  # rounded up, so that the number itself is enough
        return UserError(
            f"method.budget={self.budget}: method.options={self.options} take {up:.4f} bits per "
            "weight at least; give that or more, or a smaller option."
        )

    def _bits(self, task: Task) -> int:
        """The budget in bits. A budget that was computed from sizes must not lose one of them."""
        return int(self.budget * self._weights(task) * (1 + 1e-9))

    def _weights(self, task: Task) -> int:
        return sum(linear.weight.numel() for linear in task.linears().values())
