"""Synthetic text, token ids and images for tests; results on them have no meaning."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from qexp.data.corpus import SPLITS, Corpus, Example, check_split


# a run reads a split several times, and a tenth of a run on a tiny model would be drawing its words
@lru_cache(maxsize=8)
def _documents(seed: str, count: int, words: int) -> tuple[str, ...]:
    rng = random.Random(seed)
    letters = "etaoinshrdlu"
    vocabulary = ["".join(rng.choices(letters, k=rng.randint(1, 8))) for _ in range(500)]
    return tuple(" ".join(rng.choices(vocabulary, k=words)) + ".\n" for _ in range(count))


@dataclass(frozen=True)
class Synthetic(Corpus):
    """Seeded random words in `count` documents of `words` words; random ids; random images."""

    seed: int = 0
    count: int = 200
    words: int = 200
    name: str = "synthetic"
    calibration_split: str = "train"
    evaluation_split: str = "test"

    def documents(self, split: str) -> list[str]:
        check_split(self, split, SPLITS)
        return list(_documents(f"{self.seed} {split}", self.count, self.words))

    def text(self, split: str) -> str:
        return "".join(self.documents(split))

    def files(self, split: str) -> list[Path]:
        return []

    def ids(self, split: str, vocabulary: int, count: int) -> Int64[Tensor, " tokens"]:
        return torch.randint(vocabulary, (count,), generator=self._generator(split))

    def examples(self, split: str) -> list[Example]:
        """Alternately words without the letter e (class 0) and words with it (class 1)."""
        examples = []
        for index, document in enumerate(self.documents(split)):
            label = index % 2
            words = [word for word in document.split() if ("e" in word) == bool(label)]
            examples.append(Example(" ".join(words[:12]), None, label))
        return examples

    def total(self, split: str) -> int:
        return self.count

    def images(
        self, split: str, shape: Sequence[int], classes: int, rows: Sequence[int]
    ) -> tuple[Float[Tensor, "images channels height width"], Int64[Tensor, " images"]]:
        """One picture per class plus noise."""
        pictures = torch.randn(classes, *shape, generator=self._generator("train"))
        generator = self._generator(split)
        labels = torch.randint(classes, (self.count,), generator=generator)
        noise = torch.randn(self.count, *shape, generator=generator)
        chosen = list(rows)
        return (pictures[labels] + noise)[chosen], labels[chosen]

    def _generator(self, split: str) -> torch.Generator:
        check_split(self, split, SPLITS)
        return torch.Generator().manual_seed(len(SPLITS) * self.seed + SPLITS.index(split))
