"""Standard corpora, read from local files or from the hub with the same rows."""

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
    """A corpus of the catalog.

    source: `local`: files in `folder` (null: the folder QEXP_DATA_DIR); `hub`: the Hugging Face
    hub; `auto`: local files where they exist, else the hub.
    hub: replaces the repository by a mirror, or by a local folder with the same layout.
    """

    name: str
    calibration_split: str
    evaluation_split: str
    source: str = "auto"
    folder: str | None = None
    hub: str | None = None

    def __post_init__(self) -> None:
        if self.name not in CATALOG:
            raise UserError(
                f"data.name: {self.name!r} is unknown; choose from {', '.join(CATALOG)}"
            )
        if self.source not in SOURCES:
            raise UserError(
                f"data.source: {self.source!r} is unknown; choose from {', '.join(SOURCES)}"
            )

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
        info, part = self._part(split)
        if path := self._local(part):
            rows = _file_rows(self.name, path, path.stat().st_mtime_ns, labelled)
            return share(rows, part.local_share)
        if self.source == "local":
            raise UserError(self._missing(split, part, "data.source=local needs the file"))
        hub = self.hub or info.hub
        try:
            rows = _hub_rows(self.name, hub, split, labelled)
        except Exception as error:  # no network, no such repository, a changed layout, …
            reason = str(error).partition("\n")[0]
            why = f"{hub} of the hub cannot be read ({type(error).__name__}: {reason})"
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
        info = CATALOG[self.name]
        check_split(self, split, tuple(info.parts))
        return info, info.parts[split]

    def _local(self, part: SplitInfo) -> Path | None:
        folder = data_folder(self.folder)
        if self.source == "hub" or folder is None or part.local is None:
            return None
        path = folder / part.local
        return path if path.is_file() else None

    def _missing(self, split: str, part: SplitInfo, why: str) -> str:
        path = f"{data_folder(self.folder) or '$QEXP_DATA_DIR'}/{part.local}"
        remedy = f"put the {split} text at {path}" if part.local else "the hub must be reachable"
        options = "; or ".join(filter(None, [remedy, part.instead]))
        return f"data={self.name}: no {split} split here: {why}; {options}"


@lru_cache(maxsize=4)
def _file_rows(name: str, path: Path, mtime_ns: int, labelled: bool) -> list[Any]:
    info = CATALOG[name]
    if path.name.endswith((".jsonl", ".json.gz", ".tsv")):
        return [_read(info, labelled)(record) for record in read_records(path)]
    return info.rows(read_text(path))


@lru_cache(maxsize=4)
def _hub_rows(name: str, hub: str, split: str, labelled: bool) -> list[Any]:
    from datasets import load_dataset  # takes seconds to import; local files do not need it

    info, part = CATALOG[name], CATALOG[name].parts[split]
    log.info("data=%s: reading the %s split of %s from the hub", name, part.hub, hub)
    streaming = info.take is not None
    dataset = load_dataset(
        hub,
        info.config,
        split=part.hub,
        data_files={part.hub: part.shard} if part.shard else None,
        revision=None if Path(hub).is_dir() else info.revision,
        streaming=streaming,
    )
    rows = dataset.take(info.take) if streaming else dataset
    return [_read(info, labelled)(record) for record in rows]


def _read(info: CorpusInfo, labelled: bool) -> Callable[[dict[str, Any]], Any]:
    return info.example if labelled and info.example is not None else info.record
