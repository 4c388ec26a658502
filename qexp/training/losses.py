"""Training losses: the task's own, distillation from the float model, and penalty terms."""

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
        """Whether it depends on every parameter."""
        return True

    def check(self, task: Task) -> None:  # noqa: B027 (optional)
        """Raises UserError, before any computation, if it is not defined for this model."""

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
    """A distance from the float model. task: weight of the task's own loss, which is added."""

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
    """KL(float model || quantized model) of the predictions, in nats, mean over positions.

    LLM-QAT sums over the positions of a sequence; with AdamW this only changes the effective
    epsilon.
    """

    def distance(self, output: ModelOutput, target: ModelOutput) -> Float[Tensor, ""]:
        student, teacher = (
            each.logits.flatten(0, -2).float().log_softmax(-1) for each in (output, target)
        )
        return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


@dataclass(frozen=True)
class HiddenL2(FromTeacher):
    """Squared distance of the hidden states after each block, relative to the float model's norm.

    The mean over blocks of ‖h - h_float‖² / ‖h_float‖².
    """

    hidden = True

    @property
    def reaches_all(self) -> bool:
        return bool(self.task)

    def distance(self, output: ModelOutput, target: ModelOutput) -> Float[Tensor, ""]:
        pairs = zip(output.hidden_states[1:], target.hidden_states[1:], strict=True)
        errors = [
            (student.float() - teacher.float()).square().mean() / teacher.float().square().mean()
            for student, teacher in pairs
        ]
        return torch.stack(errors).mean()


class Penalty(ABC):
    """A term added to the objective, computed from activations."""

    @abstractmethod
    def watch(self, task: Task) -> "AbstractContextManager[Watch]":
        """Registers hooks on the model for the context."""


class Watch(ABC):
    """The registered hooks of a penalty."""

    @abstractmethod
    def take(self, loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """The weighted penalty of the forward pass that computed `loss`; resets the watch."""

    @property
    def notes(self) -> dict[str, Any]:
        """State between steps, saved in checkpoints and updated from them."""
        return {}
