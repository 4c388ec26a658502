"""Costs of rounding single linears in one way, in units that compare between layers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qexp.common.errors import UserError, check_bool, check_int
from qexp.common.frozen import frozen
from qexp.hessian import AtFloatWeights, CacheableHessian, Diagonal
from qexp.hessian.base import ForEachGroup, collected
from qexp.solvers.base import error
from qexp.step import Record
from qexp.task import Batch, Task
from qexp.walk import Block, walk


class Metric(ABC):
    @abstractmethod
    def __call__(
        self, task: Task, data: Sequence[Batch], records: Sequence[Record]
    ) -> dict[str, float]:
        """The cost of each linear's rounding, by full name.

        task: the float model, which stays as it is. records: every linear, rounded in one way.
        """


@dataclass(frozen=True)
class Loss(Metric):
    """tr(Δ H Δᵀ) / rows with a Hessian of the model's loss: the second-order increase of the loss,
    in one unit for all layers.

    Such a Hessian is a sum over rows; its mean over rows approximates the curvature of each.
    hessian: measured at float weights, whatever its schedule.
    average: H is replaced by its mean diagonal, so that the cost is that times ‖Δ‖² (HAWQ-V2,
    1911.03852, as we remember it).
    """

    hessian: CacheableHessian
    average: bool = False

    def __post_init__(self) -> None:
        check_bool("method.metric", self, "average")
        if not self.hessian.is_matrix:
            raise UserError(
                f"method.metric.hessian: {type(self.hessian).__name__} has more than products of "
                "inputs, or less; give method/metric=loss or loss_output, with one group of rows "
                "(method.metric.hessian.groups=1)."
            )

    def __call__(
        self, task: Task, data: Sequence[Batch], records: Sequence[Record]
    ) -> dict[str, float]:
        return _by_hessian(self.hessian, task, data, records, self._increase)

    def _increase(
        self, change: Float[Tensor, "rows columns"], hessian: Float[Tensor, "columns columns"]
    ) -> float:
        if self.average:
            mean = float(hessian.diagonal().double().mean())
            return mean * error(change, None) / len(change)
        return error(change, hessian) / len(change)


@dataclass(frozen=True)
class Fisher(Metric):
    """Σ F ∘ Δ² with F the squared gradients of every weight: the second-order increase of the loss
    in the diagonal of its Fisher matrix (LQ-LoRA, 2311.12023).

    hessian: of squared gradients, measured at float weights, whatever its schedule.
    """

    hessian: Diagonal

    def __call__(
        self, task: Task, data: Sequence[Batch], records: Sequence[Record]
    ) -> dict[str, float]:
        return _by_hessian(
            self.hessian,
            task,
            data,
            records,
            lambda change, fisher: float((fisher * change.square()).sum(dtype=torch.float64)),
        )


def _by_hessian(
    hessian: CacheableHessian,
    task: Task,
    data: Sequence[Batch],
    records: Sequence[Record],
    cost: Callable[[Tensor, Tensor], float],
) -> dict[str, float]:
    """`cost` of the change of every linear and its Hessian at float weights."""
    rounded = {record.name: record.packed for record in records}
    measure: ForEachGroup | None = None
    costs: dict[str, float] = {}
    for block in walk(task, data, divide=hessian.divides):
        block.skip()
        measure = measure or AtFloatWeights(hessian).prepare(block)
        hessians = collected(measure, block)
        for name, linear in block.linears.items():
            full = f"{block.name}.{name}"
            weight = linear.weight.detach()
            change = rounded[full].dequantize().to(weight) - weight
            costs[full] = cost(change, hessians[name])
    return costs


@dataclass(frozen=True)
class Relative(Metric):
    """The error of `layers.csv`: a share of each layer's output energy, in no common unit."""

    def __call__(
        self, task: Task, data: Sequence[Batch], records: Sequence[Record]
    ) -> dict[str, float]:
        return {record.name: record.error for record in records}


@dataclass(frozen=True)
class FirstOrder(Metric):
    """Σ |∂L/∂W ∘ (W - Ŵ)| with the gradient of the model in which every linear is rounded in this
    way (AutoRound's AutoScheme).

    sequences: that run together; affects speed and memory only.
    """

    sequences: int = 4

    def __post_init__(self) -> None:
        check_int("method.metric", self, sequences=1)

    def __call__(
        self, task: Task, data: Sequence[Batch], records: Sequence[Record]
    ) -> dict[str, float]:
        linears = task.linears()
        floats = {name: linear.weight.detach() for name, linear in linears.items()}
        with replaced({linears[record.name]: record for record in records}):
            weights = [linear.weight for linear in linears.values()]
            totals = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
            with torch.enable_grad(), frozen(task):
                for weight in weights:
                    weight.requires_grad_(True)
                for loss, running in _first(task, data).losses(self.sequences):
                    gradients = torch.autograd.grad(loss * running, weights)
                    for total, gradient in zip(totals, gradients, strict=True):
                        total += gradient
                for weight in weights:
                    weight.requires_grad_(False)
            parts = zip(linears, weights, totals, strict=True)
            return {
                name: float((total * (floats[name] - weight.detach()).float()).abs().sum().double())
                for name, weight, total in parts
            }


@dataclass(frozen=True)
class MeasuredLoss(Metric):
    """The loss with one linear rounded, minus that of the float model: a forward pass over the data
    for each linear and option (AdaQuant's integer program, 2006.10518). May be negative.

    sequences: that run together; affects speed and memory only.
    """

    sequences: int = 4

    def __post_init__(self) -> None:
        check_int("method.metric", self, sequences=1)

    def __call__(
        self, task: Task, data: Sequence[Batch], records: Sequence[Record]
    ) -> dict[str, float]:
        rounded = {record.name: record for record in records}
        costs: dict[str, float] = {}
        start: float | None = None
        for block in walk(task, data):
            start = self._loss(block) if start is None else start
            for name, linear in block.linears.items():
                full = f"{block.name}.{name}"
                with replaced({linear: rounded[full]}):
                    costs[full] = self._loss(block) - start
        return costs

    @torch.no_grad()
    def _loss(self, block: Block) -> float:
        """The model's mean loss, from the inputs of a block."""
        parts = [(float(loss) * count, count) for loss, count in block.losses(self.sequences)]
        return sum(loss for loss, _ in parts) / sum(count for _, count in parts)


@contextmanager
def replaced(records: dict[nn.Linear, Record]) -> Iterator[None]:
    """Within the context these linears have the rounded weights of their records."""
    floats = {linear: linear.weight.data for linear in records}
    try:
        for linear, record in records.items():
            linear.weight.data = record.packed.dequantize().to(linear.weight)
        yield
    finally:
        for linear, weight in floats.items():
            linear.weight.data = weight


def _first(task: Task, data: Sequence[Batch]) -> Block:
    return next(iter(walk(task, data)))
