"""The training loss with its penalty, and a probe forward that observes the model between steps."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from qexp.task import Batch, Task
from qexp.training.losses import Objective, Watch


@dataclass(frozen=True)
class PenalizedLoss:
    """An objective plus the penalty that `watch` measured in the same forward pass."""

    objective: Objective
    task: Task
    teacher: PreTrainedModel | None
    watch: Watch | None

    def __call__(self, batch: Batch) -> Float[Tensor, ""]:
        loss = self.objective(self.task, self.teacher, batch)
        return loss if self.watch is None else loss + self.watch.take(loss)

    def plain(self, batch: Batch) -> Float[Tensor, ""]:
        """The objective only, for validation; the record of the penalty is dropped."""
        loss = self.objective(self.task, self.teacher, batch)
        if self.watch is not None:
            self.watch.take(loss)
        return loss


@dataclass(frozen=True)
class Probe:
    """One forward in evaluation mode: no dropout, whose random state belongs to training."""

    task: Task
    loss: Callable[[Batch], Tensor]
    batch: Batch

    def __call__(self) -> None:
        self.task.eval()
        try:
            self.loss(self.batch)
        finally:
            self.task.train()
