"""What every measurement answers."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qexp.data.corpus import Corpus
from qexp.task import Task


class FloatModel(NamedTuple):
    """A run before anything in its model is changed."""

    model: Mapping[str, str]  # what the float model's numbers depend on, for keys of caches
    task: Callable[[], Task]  # the float model, loaded at the first call if it is not yet
    folder: Path  # of the run, for what is not a number


class Evaluator(ABC):
    """A name and, for a model, numbers. Nothing else knows how a metric is computed."""

    name: str

    @property
    def higher_is_better(self) -> Collection[str]:
        """Names of metrics, by their last part, of which more is better; the others are errors."""
        return ()

    def check(self, task: Task) -> None:  # noqa: B027 (optional)
        """UserError, before any work, for a model of which it can say nothing."""

    def measure_float(self, start: FloatModel) -> "Evaluator":
        """What to call once the model is quantized. Who compares with the float model measures it
        here, through the cache, so that a sweep does it once."""
        return self

    @abstractmethod
    def __call__(self, task: Task) -> dict[str, float]:
        """Metrics by key, without the name."""

    @abstractmethod
    def definition(self) -> dict[str, Any]:
        """Everything besides the model that the numbers depend on, as JSON; no paths, no batch
        sizes. Two numbers may stand in one column of a table if their definitions are equal."""

    def facts(self, task: Task) -> dict[str, Any]:
        """What is recorded of a measurement beside its definition."""
        return {"dtype": dtype_of(task)}

    def followed(self, task: Task) -> dict[str, Any]:
        """What it did as the model's tokenizer says, if that is a choice: a part of the definition
        that is known once there is a model."""
        return {}

    @abstractmethod
    def files(self) -> list[Path]:
        """The local files it reads."""

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
    """An evaluator that has seen the float model: `measure` knows what was seen."""

    plain: Evaluator
    measure: Callable[[Task], dict[str, float]]

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.plain.name

    @property
    def higher_is_better(self) -> Collection[str]:
        return self.plain.higher_is_better

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


def dtype_of(task: Task) -> str:
    """The dtype that the model computes in."""
    return str(task.model.dtype).removeprefix("torch.")


def digest(definition: Mapping[str, Any]) -> str:
    """Eight hex digits of a definition."""
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()[:8]
