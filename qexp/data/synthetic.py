"""Made-up text, token ids and images: any model runs on them, and no number means anything."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from qexp.data.corpus import SPLITS, Corpus, check_split


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
        rng = random.Random(f"{self.seed} {split}")
        letters = "etaoinshrdlu"
        known = ["".join(rng.choices(letters, k=rng.randint(1, 8))) for _ in range(500)]
        return [" ".join(rng.choices(known, k=self.words)) + ".\n" for _ in range(self.count)]

    def text(self, split: str) -> str:
        return "".join(self.documents(split))

    def files(self, split: str) -> list[Path]:
        return []

    def ids(self, split: str, vocabulary: int, count: int) -> Int64[Tensor, " tokens"]:
        return torch.randint(vocabulary, (count,), generator=self._generator(split))

    def images(
        self, split: str, shape: Sequence[int], classes: int
    ) -> tuple[Float[Tensor, "images channels height width"], Int64[Tensor, " images"]]:
        generator = self._generator(split)
        pixels = torch.randn(tuple(shape), generator=generator)
        return pixels, torch.randint(classes, (shape[0],), generator=generator)

    def _generator(self, split: str) -> torch.Generator:
        check_split(self, split, SPLITS)
        return torch.Generator().manual_seed(len(SPLITS) * self.seed + SPLITS.index(split))
