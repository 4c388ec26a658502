"""Interface of corpora: named texts or images with splits."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Float, Int64
from torch import Tensor

from qexp.common.errors import UserError

SPLITS = ("train", "validation", "test")


class Example(NamedTuple):
    """A labelled text, or a labelled pair of texts."""

    text: str
    second: str | None
    label: int


class Corpus(ABC):
    """A named text with splits. Fields are the keys of conf/data/.

    Calibration reads `calibration_split` and evaluation `evaluation_split`, unless a recipe or a
    protocol names another split.
    """

    name: str
    calibration_split: str
    evaluation_split: str

    @abstractmethod
    def documents(self, split: str) -> list[str]:
        """The rows as on the Hugging Face hub. For WikiText a row is one line with its newline, and
        a blank line is an empty row."""

    @abstractmethod
    def text(self, split: str) -> str:
        """The running text as in the file, or else the documents joined by blank lines."""

    @abstractmethod
    def files(self, split: str) -> list[Path]:
        """The local files that `split` is read from; empty for the hub and for synthetic text."""

    def fingerprint(self, split: str) -> str:
        """The sha256 of the content: the rows with their boundaries, and the running text."""
        return digest([*self.documents(split), self.text(split)])

    def overlaps(self, split: str, other: "Corpus", other_split: str) -> bool:
        """Whether the two splits share text."""
        return (self.name, split) == (other.name, other_split)

    def ids(self, split: str, vocabulary: int, count: int) -> Int64[Tensor, " tokens"]:
        """Token ids for a model without a tokenizer; only the synthetic corpus has them."""
        raise UserError(
            f"data.name: {self.name} is text and this model has no tokenizer; choose data=synthetic"
        )

    def examples(self, split: str) -> list[Example]:
        """The labelled rows, for classification of texts."""
        raise UserError(f"data.name: {self.name} has no labelled rows; choose data=sst2")

    def total(self, split: str) -> int:
        """Number of labelled images."""
        raise UserError(f"data.name: {self.name} has no images; choose data=cifar10")

    def images(
        self, split: str, shape: Sequence[int], classes: int, rows: Sequence[int]
    ) -> tuple[Float[Tensor, "images channels height width"], Int64[Tensor, " images"]]:
        """The images with the indices `rows`, in `shape` (channels, height, width), normalized; and
        their labels, all below `classes`."""
        raise UserError(f"data.name: {self.name} has no images; choose data=cifar10")


def digest(texts: Sequence[str]) -> str:
    """The sha256 of a list of texts, including their boundaries."""
    hashed = hashlib.sha256()
    for text in texts:
        content = text.encode("utf-8", "surrogatepass")
        hashed.update(f"{len(content)}\n".encode())
        hashed.update(content)
    return hashed.hexdigest()


def share(documents: list[Any], part: tuple[float, float]) -> list[Any]:
    """The documents between two fractions of the list; adjacent parts never overlap."""
    start, stop = (round(fraction * len(documents)) for fraction in part)
    return documents[start:stop]


def check_split(corpus: Corpus, split: str, known: Sequence[str]) -> None:
    """UserError unless `split` is one of the corpus's splits."""
    if split not in known:
        raise UserError(
            f"data.name: {corpus.name} has no split {split!r}; it has {', '.join(known)}"
        )
