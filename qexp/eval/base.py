"""Interface of evaluators."""

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qexp.data.corpus import Corpus
from qexp.quantizers.attention import reads_float
from qexp.task import Task

log = logging.getLogger(__name__)


class FloatModel(NamedTuple):
    """The float model of a run, before anything in it is changed."""

    model: Mapping[str, str]  # everything the float model's metrics depend on, for cache keys
    task: Callable[[], Task]  # loads the float model at the first call if necessary
    folder: Path  # of the run, for output other than metrics


class Evaluator(ABC):
    """A named measurement of a model. Metrics are computed only in evaluators."""

    name: str

    @property
    def higher_is_better(self) -> Collection[str]:
        """Names of metrics, by their last part, of which more is better; the others are errors."""
        return ()

    @property
    def decodes(self) -> bool:
        """Whether the model reads a cache of its own in it, as in generation."""
        return False

    def check(self, task: Task) -> None:  # noqa: B027 (optional)
        """Raises UserError, before any computation, if it cannot measure this model."""

    def measure_float(self, start: FloatModel) -> "Evaluator":
        """The evaluator to call on the quantized model.

        Evaluators that compare with the float model measure it here. They use the cache, so a
        sweep measures it once.
        """
        return self

    @abstractmethod
    def __call__(self, task: Task) -> dict[str, float]:
        """Metrics by key, without the evaluator's name."""

    @abstractmethod
    def definition(self) -> dict[str, Any]:
        """Everything that the metrics depend on, apart from the model, as JSON.

        Paths and batch sizes are excluded. Metrics with equal definitions are comparable and share
        a column of a table.
        """

    def facts(self, task: Task) -> dict[str, Any]:
        """What is recorded of a measurement in addition to its definition."""
        return {"dtype": dtype_of(task)}

    def followed(self, task: Task) -> dict[str, Any]:
        """What it did as the model's tokenizer says, if that is a choice: a part of the definition
        that is known once there is a model."""
        return {}

    @abstractmethod
    def files(self) -> list[Path]:
        """The local files that it reads."""

    @abstractmethod
    def reads(self) -> list[tuple[Corpus, str]]:
        """The corpora and splits that its numbers are of."""

    def judged(self) -> str:
        """What of it tables are judged on, in words: a corpus's evaluation split. Empty for text
        that settings may be chosen on."""
        found = [f"the {s} split of {c.name}" for c, s in self.reads() if s == c.evaluation_split]
        return ", ".join(found)


@dataclass(frozen=True)
class WithReference(Evaluator):
    """An evaluator after the float model was measured; `measure` holds the float results."""

    plain: Evaluator
    measure: Callable[[Task], dict[str, float]]

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.plain.name

    @property
    def higher_is_better(self) -> Collection[str]:
        return self.plain.higher_is_better

    @property
    def decodes(self) -> bool:
        return self.plain.decodes

    def __call__(self, task: Task) -> dict[str, float]:
        return self.measure(task)

    def definition(self) -> dict[str, Any]:
        return self.plain.definition()

    def facts(self, task: Task) -> dict[str, Any]:
        return self.plain.facts(task)

    def followed(self, task: Task) -> dict[str, Any]:
        return self.plain.followed(task)

    def files(self) -> list[Path]:
        return self.plain.files()

    def reads(self) -> list[tuple[Corpus, str]]:
        return self.plain.reads()

    def judged(self) -> str:
        return self.plain.judged()


def warn_of_float_cache(evaluator: Evaluator, task: Task) -> None:
    """Warn of a quantized cache that has no part in the numbers of an evaluator."""
    if reads_float(task.model) and not evaluator.decodes:
        log.warning(
            "eval %s: with kv.protocol=prefill a single pass reads keys and values float, so these "
            "numbers are those of kv=none; choose eval=decoding, or kv.protocol=teacher_forced",
            evaluator.name,
        )


def dtype_of(task: Task) -> str:
    """The dtype that the model computes in."""
    return str(task.model.dtype).removeprefix("torch.")


def digest(definition: Mapping[str, Any]) -> str:
    """The first eight hex digits of the SHA-256 of a definition."""
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()[:8]
