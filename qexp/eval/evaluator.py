"""What every measurement answers."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qexp.task import Task


class Evaluator(ABC):
    """A name and, for a model, numbers. Nothing else knows how a metric is computed."""

    name: str

    @abstractmethod
    def __call__(self, task: Task) -> dict[str, float]:
        """Metrics by key, without the name."""

    @abstractmethod
    def definition(self) -> dict[str, Any]:
        """Everything besides the model that the numbers depend on, as JSON; no paths, no batch
        sizes. Two numbers may stand in one column of a table if their definitions are equal."""

    @abstractmethod
    def files(self) -> list[Path]:
        """The local files it reads."""


def digest(definition: Mapping[str, Any]) -> str:
    """Eight hex digits of a definition."""
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()[:8]
