"""Corpora that everyone knows, from local files or from the hub: the same rows either way."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from qexp.common.errors import UserError
from qexp.common.files import data_folder
from qexp.data.catalog import CATALOG, CorpusInfo, SplitInfo
from qexp.data.corpus import Corpus, Example, check_split, digest, share
from qexp.data.readers import read_records, read_text

log = logging.getLogger(__name__)

SOURCES = ("auto", "local", "hub")


@dataclass(frozen=True)
class StandardCorpus(Corpus):
    """A corpus of the table of facts.

    `source`: `local` = files in `folder` (null: the folder that QEXP_DATA_DIR names), `hub` = the
    Hugging Face hub, `auto` = local files where they are, else the hub. `hub` overrides the
    repository: a mirror, or a local folder laid out like it.
    """

    name: str
    calibration_split: str
    evaluation_split: str
    source: str = "auto"
    folder: str | None = None
    hub: str | None = None

    def __post_init__(self) -> None:
        if self.name not in CATALOG:
            raise UserError(f"data.name: {self.name!r} is none of {', '.join(CATALOG)}")
        if self.source not in SOURCES:
            raise UserError(f"data.source: {self.source!r} is none of {', '.join(SOURCES)}")

    def documents(self, split: str) -> list[str]:
        return self._rows(split, labelled=False)

    def examples(self, split: str) -> list[Example]:
        if CATALOG[self.name].example is None:
            raise UserError(f"data={self.name}: has no labelled rows; choose data=sst2")
        return self._rows(split, labelled=True)

    def fingerprint(self, split: str) -> str:
        labels = [] if CATALOG[self.name].example is None else map(str, self.examples(split))
        return digest([*self.documents(split), self.text(split), *labels])

    def _rows(self, split: str, labelled: bool) -> list[Any]:
        facts, part = self._part(split)
        if path := self._local(part):
            rows = _file_rows(self.name, path, path.stat().st_mtime_ns, labelled)
            return share(rows, part.local_share)
        if self.source == "local":
            raise UserError(self._missing(split, part, "data.source=local asks for the file"))
        hub = self.hub or facts.hub
        try:
            rows = _hub_rows(self.name, hub, split, labelled)
        except Exception as error:  # no network, no such repository, a changed layout, …
            reason = str(error).partition("\n")[0]
            why = f"the hub's {hub} did not answer ({type(error).__name__}: {reason})"
            raise UserError(self._missing(split, part, why)) from error
        return share(rows, part.hub_share)

    def overlaps(self, split: str, other: Corpus, other_split: str) -> bool:
        """By the hub's split that both are parts of; local files are divided likewise."""
        if not isinstance(other, StandardCorpus):
            return False
        (facts, part), (others, another) = self._part(split), other._part(other_split)
        one = (facts.same or self.name, part.hub, part.shard)
        two = (others.same or other.name, another.hub, another.shard)
        (start, stop), (begin, end) = part.hub_share, another.hub_share
        return one == two and max(start, begin) < min(stop, end)

    def text(self, split: str) -> str:
        return CATALOG[self.name].text(self.documents(split))

    def files(self, split: str) -> list[Path]:
        path = self._local(self._part(split)[1])
        return [path] if path else []

    def _part(self, split: str) -> tuple[CorpusInfo, SplitInfo]:
        facts = CATALOG[self.name]
        check_split(self, split, tuple(facts.parts))
        return facts, facts.parts[split]

    def _local(self, part: SplitInfo) -> Path | None:
        folder = data_folder(self.folder)
        if self.source == "hub" or folder is None or part.local is None:
            return None
        path = folder / part.local
        return path if path.is_file() else None

    def _missing(self, split: str, part: SplitInfo, why: str) -> str:
        place = f"{data_folder(self.folder) or '$QEXP_DATA_DIR'}/{part.local}"
        put = f"put the {split} text at {place}" if part.local else "the hub must be reachable"
        options = "; or ".join(filter(None, [put, part.instead]))
        return f"data={self.name}: no {split} split here: {why}; {options}"


@lru_cache(maxsize=4)
def _file_rows(name: str, path: Path, mtime_ns: int, labelled: bool) -> list[Any]:
    facts = CATALOG[name]
    if path.name.endswith((".jsonl", ".json.gz", ".tsv")):
        return [_read(facts, labelled)(record) for record in read_records(path)]
    return facts.rows(read_text(path))


@lru_cache(maxsize=4)
def _hub_rows(name: str, hub: str, split: str, labelled: bool) -> list[Any]:
    from datasets import load_dataset  # seconds to import, and local files never need it

    facts, part = CATALOG[name], CATALOG[name].parts[split]
    log.info("data=%s: reading the %s split of %s from the hub", name, part.hub, hub)
    streaming = facts.take is not None
    dataset = load_dataset(
        hub,
        facts.config,
        split=part.hub,
        data_files={part.hub: part.shard} if part.shard else None,
        revision=None if Path(hub).is_dir() else facts.revision,
        streaming=streaming,
    )
    rows = dataset.take(facts.take) if streaming else dataset
    return [_read(facts, labelled)(record) for record in rows]


def _read(facts: CorpusInfo, labelled: bool) -> Callable[[dict[str, Any]], Any]:
    return facts.example if labelled and facts.example is not None else facts.record
