"""Jobs answered from records of the same configuration, code and input files."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig

from qexp.common.errors import UserError
from qexp.common.files import locate
from qexp.common.hashes import sha256
from qexp.common.modules import facts
from qexp.runs import record, results, used_modules
from qexp.runs.portable import place, portable
from qexp.runs.repeatable import differences, expected, sentence
from qexp.runs.results import Answer
from qexp.runs.signature import signed

log = logging.getLogger(__name__)


class Found(NamedTuple):
    """What the records say about a job: the path of the one that answers, or why none does."""

    path: Path | None
    reason: str = ""  # empty where there is no record of the configuration at all
    note: str = ""  # what differs from here and does not count
    content: Mapping[str, Any] = {}


def paths(cfg: DictConfig) -> list[Path]:
    """The records of a configuration, whatever code they were made by."""
    top = cfg.get("records")
    if top is None or not Path(top).is_dir():
        return []
    return sorted(Path(top).rglob(f"{record.portable_signature(cfg)}.json"))


def answer(cfg: DictConfig, files: Sequence[Path]) -> Answer | None:
    """The metrics of the record that answers a job, or None (reason logged). `files`: the local
    files that the job reads."""
    found = lookup(cfg, files)
    if found.path is None:
        if found.reason:
            log.info("not answered from a record: %s", found.reason)
        return None
    log.info("answered from record %s%s", found.path, found.note)
    metrics = {name: float(value) for name, value in found.content["metrics"].items()}
    return Answer(metrics, found.path, results.total_cost(found.content["provenance"]))


def lookup(cfg: DictConfig, files: Sequence[Path] | None = None) -> Found:
    """The record that answers a job. Without `files` (a dry run builds nothing) the inputs that lie
    at the recorded place are compared, and the note counts the others."""
    found = Found(None)
    for path in paths(cfg):
        found = _check(cfg, path, files)
        if found.path is not None:
            return found
    return found


def _check(cfg: DictConfig, path: Path, files: Sequence[Path] | None) -> Found:
    try:
        content = record.read(path)
    except UserError as error:
        return Found(None, str(error))
    provenance = content["provenance"]
    inputs, code = provenance["inputs"], provenance.get("modules")
    if not isinstance(code, dict) or code.get("digest") != facts(used_modules.roots(cfg))["digest"]:
        return Found(None, f"{path} was made by other code of the modules that it uses")
    if unknown := record.unhashed(content):
        return Found(None, f"{path} has no hash of {', '.join(unknown)}")
    reason, left = _here(inputs) if files is None else (_read(cfg, inputs, files), 0)
    if reason:
        return Found(None, f"{path}: {reason}")
    if cfg.save_weights:
        return Found(None, f"{path} keeps no weights; it answers with save_weights=false")
    return Found(path, "", _note(cfg, provenance, left), content)


def _read(cfg: DictConfig, inputs: Mapping[str, Any], files: Sequence[Path]) -> str:
    """Why the files that the job reads are not those of the record; empty where they are."""
    for path in _absolute(signed(cfg)):
        covered = [file for file in files if file.resolve().is_relative_to(path)]
        if not covered:
            return f"what is read from {path} cannot be compared with another machine"
    sizes = sorted((_name(name), entry["size"]) for name, entry in inputs.items())
    if sizes != sorted((place(str(file)).rpartition("/")[2], _size(file)) for file in files):
        return "its input files are others"
    hashes = sorted(entry["sha256"] for entry in inputs.values())
    return "" if hashes == sorted(map(sha256, files)) else "its input files have another content"


def _here(inputs: Mapping[str, Any]) -> tuple[str, int]:
    """Why the inputs are not those of the record, and the number of those that are not found."""
    left = 0
    for name, entry in inputs.items():
        path = locate(name.partition("#")[0])
        if not path.is_file():
            left += 1
        elif _size(path) != entry["size"] or sha256(path) != entry["sha256"]:
            return f"{name} has another content here", 0
    return "", left


def _note(cfg: DictConfig, provenance: Mapping[str, Any], left: int) -> str:
    """What differs between the machines, in brackets."""
    parts = []
    if found := differences(provenance, expected(cfg)):
        parts.append(f"last digits may differ: {sentence(found)}")
    if left:
        parts.append(f"if {left} input file{'s' if left > 1 else ''} will be the same")
    return f" ({'; '.join(parts)})" if parts else ""


def _absolute(tree: Any) -> Iterable[Path]:
    """The absolute paths outside of the data folder that are values of a configuration."""
    if isinstance(tree, dict | list):
        for each in tree.values() if isinstance(tree, dict) else tree:
            yield from _absolute(each)
    elif isinstance(tree, str) and tree.startswith(("/", "~")) and portable(tree) != tree:
        yield Path(tree).expanduser().resolve()


def _name(name: str) -> str:
    return name.partition("#")[0].rpartition("/")[2]


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
