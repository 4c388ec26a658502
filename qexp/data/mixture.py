"""Training data from several recipes together."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qexp.common.errors import FieldError, UserError
from qexp.data.corpus import Corpus
from qexp.data.recipe import Batch, Recipe
from qexp.task import Task


@dataclass(frozen=True)
class Mixture(Recipe):
    """The batches of all `parts`, in their order; training shuffles the sequences.

    The share of a part is its number of sequences. Rows must have the same shape in all parts.
    """

    parts: Mapping[str, Recipe]

    def __post_init__(self) -> None:
        if not self.parts:
            raise FieldError("parts={}: give at least one recipe, by a name.")

    def __call__(self, task: Task) -> list[Batch]:
        found = {name: part(task) for name, part in self.parts.items()}
        shapes = {
            name: {key: tuple(value.shape[1:]) for key, value in batch.items()}
            for name, batches in found.items()
            for batch in batches
        }
        (first, shape), *others = shapes.items()
        for name, other in others:
            if other != shape:
                raise UserError(
                    f"parts.{name}: its sequences are {other}, those of {first} {shape}; give "
                    "every part the same length."
                )
        return [batch for batches in found.values() for batch in batches]

    def definition(self) -> dict[str, Any]:
        return {"parts": {name: part.definition() for name, part in self.parts.items()}}

    def followed(self, task: Task) -> dict[str, Any]:
        found = {name: part.followed(task) for name, part in self.parts.items()}
        followed = {name: each for name, each in found.items() if each}
        return {"followed": followed} if followed else {}

    def files(self) -> list[Path]:
        return sorted({path for part in self.parts.values() for path in part.files()})

    def reads(self) -> list[tuple[Corpus, str]]:
        return [read for part in self.parts.values() for read in part.reads()]
