"""Post-training quantization, then training that starts from what it stored."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

from qexp.data.recipe import Recipe
from qexp.methods.finetune import FineTune
from qexp.methods.reconstruction import Reconstruction
from qexp.quantizers.scheme import Activations
from qexp.step import Record, Step
from qexp.task import Batches, Task


@dataclass(frozen=True)
class Staged(Step):
    """`start` stores every linear, and `end` trains with these codes: scales, low-rank factors,
    norms. Activations are quantized by `start`.

    Before `end`, weights become those from before `start`: its teacher is the float model, and
    errors are measured from float weights.
    """

    start: Step
    end: FineTune | Reconstruction

    @property
    def activations(self) -> Sequence[Activations]:
        return self.start.activations

    def recipes(self) -> Mapping[str, Recipe]:
        return {**self.start.recipes(), **self.end.recipes()}

    def __call__(self, task: Task, batches: Batches) -> list[Record]:
        once = cache(batches)
        self.end.check(task)
        floats = {name: each.weight.detach().clone() for name, each in task.linears().items()}
        starts = {record.name: record.packed.whole() for record in self.start(task, once)}
        for name, linear in task.linears().items():
            linear.weight.data = floats[name]
        return replace(self.end, activations=()).tune(task, once, starts)
