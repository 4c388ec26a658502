"""What training makes small: against the data, against the float model, and penalties beside."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from qexp.common.errors import check_finite
from qexp.task import Batch, Task


class Objective(ABC):
    """A loss of the quantized model."""

    teacher: bool  # whether it compares with the float model

    @property
    def reaches_all(self) -> bool:
        """Whether every parameter has a part in it."""
        return True

    def check(self, task: Task) -> None:  # noqa: B027 (optional)
        """UserError, before any work, for a model that it cannot be measured on."""

    @abstractmethod
    def __call__(
        self, task: Task, teacher: PreTrainedModel | None, batch: Batch
    ) -> Float[Tensor, ""]: ...


@dataclass(frozen=True)
class CrossEntropy(Objective):
    """The task's own loss."""

    teacher = False

    def __call__(
        self, task: Task, teacher: PreTrainedModel | None, batch: Batch
    ) -> Float[Tensor, ""]:
        return task.loss(batch)


@dataclass(frozen=True)
class FromTeacher(Objective):
    """How far the model is from the float one; task: weight of the task's own loss beside it."""

    task: float | int = 0.0
    teacher = True
    hidden = False  # whether hidden states are compared

    def __post_init__(self) -> None:
        check_finite(None, self, "task")

    def __call__(
        self, task: Task, teacher: PreTrainedModel | None, batch: Batch
    ) -> Float[Tensor, ""]:
        assert teacher is not None
        inputs = {key: each.to(task.device) for key, each in batch.items() if key != "labels"}
        with torch.no_grad():
            target = teacher(**inputs, output_hidden_states=self.hidden)
        distance = self.distance(task.model(**inputs, output_hidden_states=self.hidden), target)
        return distance + self.task * task.loss(batch) if self.task else distance

    @abstractmethod
    def distance(self, output: ModelOutput, target: ModelOutput) -> Float[Tensor, ""]: ...


@dataclass(frozen=True)
class LogitKL(FromTeacher):
    """KL(float model || quantized model) of the predictions, mean over positions (LLM-QAT sums over
    a sequence's; under AdamW that is another epsilon, no more)."""

    def distance(self, output: ModelOutput, target: ModelOutput) -> Float[Tensor, ""]:
        own, other = (
            each.logits.flatten(0, -2).float().log_softmax(-1) for each in (output, target)
        )
        return F.kl_div(own, other, reduction="batchmean", log_target=True)


@dataclass(frozen=True)
class HiddenL2(FromTeacher):
    """Squared distance of the hidden states after every block from the float model's, each as a
    share of the latter's square."""

    hidden = True

    @property
    def reaches_all(self) -> bool:
        return bool(self.task)

    def distance(self, output: ModelOutput, target: ModelOutput) -> Float[Tensor, ""]:
        shares = [
            (own.float() - other.float()).square().mean() / other.float().square().mean()
            for own, other in zip(output.hidden_states[1:], target.hidden_states[1:], strict=True)
        ]
        return torch.stack(shares).mean()


class Penalty(ABC):
    """Something beside the objective, measured on what passes through the model."""

    @abstractmethod
    def watch(self, task: Task) -> "AbstractContextManager[Watch]":
        """Put hooks on the model for as long as the context lasts."""


class Watch(ABC):
    """A penalty's hooks at work."""

    @abstractmethod
    def take(self, loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """The penalty of the forward pass that just made `loss`, weighted, and a clean slate."""

    @property
    def notes(self) -> dict[str, Any]:
        """What later steps need of earlier ones: kept with a checkpoint, and filled from it."""
        return {}
