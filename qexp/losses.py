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

from qexp.task import Batch, Task


class Objective(ABC):
    """A loss of the quantized model."""

    teacher: bool  # whether it compares with the float model

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
class LogitKL(Objective):
    """KL(float model || quantized model) of the predictions, mean over positions (LLM-QAT sums over
    a sequence's; under AdamW that is another epsilon, no more). task: weight of the task's own loss
    beside it."""

    task: float | int = 0.0
    teacher = True

    def __call__(
        self, task: Task, teacher: PreTrainedModel | None, batch: Batch
    ) -> Float[Tensor, ""]:
        assert teacher is not None
        inputs = _inputs(task, batch)
        with torch.no_grad():
            target = teacher(**inputs).logits.flatten(0, -2).float().log_softmax(-1)
        logits = task.model(**inputs).logits.flatten(0, -2).float()
        divergence = F.kl_div(
            logits.log_softmax(-1), target, reduction="batchmean", log_target=True
        )
        return divergence + self.task * task.loss(batch) if self.task else divergence


@dataclass(frozen=True)
class HiddenL2(Objective):
    """Squared distance of the hidden states after every block from the float model's, each as a
    share of the latter's square; task: weight of the task's own loss beside it."""

    task: float | int = 0.0
    teacher = True

    def __call__(
        self, task: Task, teacher: PreTrainedModel | None, batch: Batch
    ) -> Float[Tensor, ""]:
        assert teacher is not None
        inputs = _inputs(task, batch)
        with torch.no_grad():
            targets = teacher(**inputs, output_hidden_states=True).hidden_states[1:]
        states = task.model(**inputs, output_hidden_states=True).hidden_states[1:]
        shares = [
            (state.float() - target.float()).square().mean() / target.float().square().mean()
            for state, target in zip(states, targets, strict=True)
        ]
        loss = torch.stack(shares).mean()
        return loss + self.task * task.loss(batch) if self.task else loss


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


def _inputs(task: Task, batch: Batch) -> Batch:
    return {key: value.to(task.device) for key, value in batch.items() if key != "labels"}
