"""Training losses: the task's own, distillation from the float model, and penalty terms."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from qexp.common.errors import check_finite, check_int, check_range
from qexp.task import Batch, Task, singly

log = logging.getLogger(__name__)


class Objective(ABC):
    """A loss of the quantized model."""

    teacher: bool  # whether it compares with the float model

    @property
    def reaches_all(self) -> bool:
        """Whether it depends on every parameter."""
        return True

    def check(self, task: Task) -> None:  # noqa: B027 (optional)
        """Raises UserError, before any computation, if it is not defined for this model."""

    def fitted(self, teacher: PreTrainedModel | None, batches: Sequence[Batch]) -> "Objective":
        """The objective with what it measures on the float model before training."""
        return self

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
        return _divergence(_log_probabilities(target), _log_probabilities(output))


@dataclass(frozen=True)
class ConfidenceKL(FromTeacher):
    """m KL(quantized || float) + (1 - m) KL(float || quantized) of the predictions, in nats, mean
    over positions (confidence-aware KL of BitDistiller, 2402.10631, section 3.3).

    confidence: m. null is the float model's mean largest probability on the first `sequences` of
    the training data; its code sums one batch more than it divides by, and counts padding. 0 is
    `LogitKL`, 1 the reverse divergence.
    """

    confidence: float | int | None = None
    sequences: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int(None, self, sequences=1)
        if self.confidence is not None:
            check_range(None, self, "a number from 0 to 1", lambda x: 0 <= x <= 1, "confidence")

    @torch.no_grad()
    def fitted(self, teacher: PreTrainedModel | None, batches: Sequence[Batch]) -> "ConfidenceKL":
        if self.confidence is not None:
            return self
        assert teacher is not None
        found: list[Tensor] = []
        for batch in islice(singly(batches), self.sequences):
            inputs = {k: each.to(teacher.device) for k, each in batch.items() if k != "labels"}
            largest = teacher(**inputs).logits.float().softmax(-1).amax(-1).flatten()
            found.append(largest.double())
        confidence = float(torch.cat(found).mean())
        log.info("mean confidence of the float model: %.4g", confidence)
        return replace(self, confidence=confidence)

    def distance(self, output: ModelOutput, target: ModelOutput) -> Float[Tensor, ""]:
        assert self.confidence is not None
        ours, theirs = _log_probabilities(output), _log_probabilities(target)
        m = self.confidence
        if m in (0, 1):
            return _divergence(ours, theirs) if m else _divergence(theirs, ours)
        return m * _divergence(ours, theirs) + (1 - m) * _divergence(theirs, ours)


Logs = Float[Tensor, "positions classes"]


def _log_probabilities(output: ModelOutput) -> Logs:
    logs: Tensor = output.logits.flatten(0, -2).float().log_softmax(-1)
    return logs


def _divergence(p: Logs, q: Logs) -> Float[Tensor, ""]:
    """KL(p || q), mean over positions."""
    return F.kl_div(q, p, reduction="batchmean", log_target=True)


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
