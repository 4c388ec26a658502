"""Corpus of the Python documentation that is part of every interpreter."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from pydoc_data.topics import topics

from qexp.data.corpus import Corpus, check_split

LONG = 60  # characters; shorter paragraphs ("Changed in version 3.8.") may repeat


@dataclass(frozen=True)
class PythonDocs(Corpus):
    """The help topics of `pydoc_data`, divided by topic; needs no file and no network.

    Many topics quote each other. Topics that share a paragraph longer than 60 characters form one
    family. Whole families, largest first, are added to the split with less text so far, `train` or
    `test`. So no such paragraph is in both splits; repetitions inside a split are left out. Topics
    of a split are in alphabetical order. The text differs between Python versions.
    """

    name: str = "python_docs"
    calibration_split: str = "train"
    evaluation_split: str = "test"

    def documents(self, split: str) -> list[str]:
        check_split(self, split, ("train", "test"))
        return list(_halves()[("train", "test").index(split)])

    def text(self, split: str) -> str:
        return "\n\n".join(self.documents(split))

    def files(self, split: str) -> list[Path]:
        return []


@lru_cache(maxsize=1)
def _halves() -> tuple[tuple[str, ...], tuple[str, ...]]:
    seen: set[str] = set()
    texts = {}
    families: list[tuple[set[str], set[str]]] = []  # topics, their long paragraphs
    for topic in sorted(topics):
        paragraphs = topics[topic].strip().split("\n\n")
        long = {paragraph for paragraph in paragraphs if len(paragraph) > LONG}
        kin = [family for family in families if family[1] & long]
        families = [family for family in families if not family[1] & long]
        members = {topic}.union(*(names for names, _ in kin))
        families.append((members, long.union(*(shared for _, shared in kin))))
        texts[topic] = "\n\n".join(part for part in paragraphs if part not in seen)
        seen |= long
    sized = [(sum(len(texts[topic]) for topic in names), sorted(names)) for names, _ in families]
    halves: tuple[list[str], list[str]] = ([], [])
    totals = [0, 0]
    for size, names in sorted(sized, key=lambda family: (-family[0], family[1])):
        smaller = totals.index(min(totals))
        totals[smaller] += size
        halves[smaller].extend(names)
    train, test = (tuple(texts[t] for t in sorted(half) if texts[t]) for half in halves)
    return train, test
