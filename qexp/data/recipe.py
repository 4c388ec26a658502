"""Interface of calibration recipes."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qexp.data.corpus import Corpus
from qexp.task import Task

Batch = dict[str, Tensor]


class Recipe(ABC):
    """Batches for a model, in the form that its objective requires."""

    @abstractmethod
    def __call__(self, task: Task) -> list[Batch]:
        """The batches, on the CPU."""

    @abstractmethod
    def definition(self) -> dict[str, Any]:
        """Everything except the model that the batches depend on; contents as sha256."""

    def followed(self, task: Task) -> dict[str, Any]:
        """What it did as the model's tokenizer or family says, if that is a choice: a part of the
        definition that is known once there is a model."""
        return {}

    @abstractmethod
    def files(self) -> list[Path]:
        """The local files that the recipe reads."""

    def reads(self) -> list[tuple[Corpus, str]]:
        """The corpora and splits that it takes text from."""
        return []


@dataclass(frozen=True)
class NoCalibration(Recipe):
    """No data, for methods that use only the weights."""

    def __call__(self, task: Task) -> list[Batch]:
        return []

    def definition(self) -> dict[str, Any]:
        return {}

    def files(self) -> list[Path]:
        return []
