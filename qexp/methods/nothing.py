"""No weight is touched: the float model, or activation quantization alone."""

from dataclasses import dataclass

from qexp.activations import Activations, quantize_activations
from qexp.methods.step import Batches, Record, Step
from qexp.task import Task


@dataclass(frozen=True)
class Nothing(Step):
    """Weights as they are."""

    activations: tuple[Activations, ...] | list[Activations] = ()

    def __call__(self, task: Task, batches: Batches) -> list[Record]:
        quantize_activations(task, self.activations, batches)
        return []
