"""Several steps as one transform, in order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qexp.common.errors import UserError
from qexp.data.recipe import Recipe
from qexp.quantizers.scheme import Activations, FloatActivations
from qexp.step import Record, Step
from qexp.task import Batches, Task


@dataclass(frozen=True)
class Chain(Step):
    """Each step on the model that the one before it left.

    steps: by name, with the settings of each. order: of the names. Only the method, which comes
    after all of them, may put quantizers on activations or leave codes of weights.
    """

    steps: Mapping[str, Step]
    order: Sequence[str]

    def __post_init__(self) -> None:
        if sorted(self.order) != sorted(self.steps):
            raise UserError(
                f"transform.order={list(self.order)}: name each of transform.steps once, "
                f"{sorted(self.steps)}"
            )
        for name, step in self.steps.items():
            if any(not isinstance(kind, FloatActivations) for kind in step.activations):
                raise UserError(
                    f"transform.steps.{name}: it would leave activation quantizers that the steps "
                    f"after it do not expect; give transform.steps.{name}.activations=[]"
                )

    def __call__(self, task: Task, batches: Batches) -> list[Record]:
        for name in self.order:
            if self.steps[name](task, batches):
                raise UserError(
                    f"transform.steps.{name}: it quantizes weights, which only method may; give it "
                    "as method, or leave its weights in float"
                )
        return []

    def recipes(self) -> Mapping[str, Recipe]:
        return {
            f"{name}.{purpose}": recipe
            for name in self.order
            for purpose, recipe in self.steps[name].recipes().items()
        }

    @property
    def activations(self) -> Sequence[Activations]:
        return ()

    @property
    def leaves_maps(self) -> bool:
        return any(step.leaves_maps for step in self.steps.values())
