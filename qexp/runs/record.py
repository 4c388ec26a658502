"""Records: what is kept of finished runs in one small JSON file each, to be committed.

A record holds no private path, no host and no user: input files have the name below the data
folder, or their file name alone, and the hash of their content.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from qexp.common.errors import UserError
from qexp.common.files import atomic
from qexp.common.hashes import sha256
from qexp.runs import results
from qexp.runs.portable import place, portable
from qexp.runs.provenance import stamp
from qexp.runs.signature import UNSIGNED, WORDS, short_hash, signed

FORMAT = 1
NAMES = f"{'[0-9a-f]' * 8}.json"  # as a pattern: <signature>.json
KINDS = {
    **dict.fromkeys(("choices", "config", "metrics", "provenance", "resolved"), dict),
    **{"layers": list, "overrides": list, "signature": str},
}
MACHINE = ("processor", "cores", "cuda")  # the host's name and kernel are nobody's business
OTHER_RUN = "${run_config:"  # an interpolation that only the folder of another run can resolve
DIGITS = 6  # significant digits of a layer's error
WIDTH = 100
BLOCK = re.compile(r"(?<=\.)\d+(?=\.)")  # of a linear's name, the first number

Layers = list[dict[str, str]]


def of(folder: Path) -> dict[str, Any]:
    """The record of the finished run in a folder. Raises UserError where a file is unreadable."""
    cfg = results.written_config(folder)
    name = portable_signature(cfg)
    cfg = OmegaConf.masked_copy(
        cfg, [str(key) for key in cfg if key not in UNSIGNED or key in WORDS]
    )
    written: Any = OmegaConf.to_container(cfg)
    other_run = [key for key, value in written.items() if OTHER_RUN in json.dumps(value)]
    provenance = results.provenance(folder)
    provenance["machine"] = {
        key: value for key, value in provenance.get("machine", {}).items() if key in MACHINE
    }
    provenance.pop("command", None)  # the overrides say it
    provenance["inputs"] = inputs(provenance.get("inputs", {}))
    content = {
        "config": written,
        # values that only this machine can resolve
        "resolved": {key: OmegaConf.to_container(cfg[key], resolve=True) for key in other_run},
        "choices": {
            group: option
            for group, option in results.choices(folder).items()
            if not group.startswith("hydra/")
        },
        "overrides": results.overrides(folder),
        "provenance": provenance,
    }
    content = portable(json.loads(json.dumps(content, default=str)))
    return content | {
        "format": FORMAT,
        "signature": name,
        "metrics": results.metrics(folder),
        "layers": packed(results.layers(folder)),
    }


def portable_signature(cfg: DictConfig) -> str:
    """The signature of a configuration without private paths: equal on all machines, and equal to
    the run's signature where the configuration has no absolute path."""
    return short_hash(portable(signed(cfg)))


def inputs(recorded: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Size and sha256 of each input file by its portable name; no sha256 of a file that is not here
    any more as the run read it."""
    found: dict[str, dict[str, Any]] = {}
    for path, seen in sorted(recorded.items()):
        name, number = place(path), 2
        while name in found:  # files of equal names in two folders
            name, number = f"{place(path)}#{number}", number + 1
        found[name] = {"size": (seen or {}).get("size")}
        if seen is not None and stamp(Path(path)) == seen:
            found[name]["sha256"] = sha256(Path(path))
    return found


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a record atomically, keys sorted, lines of at most WIDTH but for lists of numbers."""
    with atomic(path) as temporary:
        temporary.write_text(rendered(content) + "\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    """The content of a record. Raises UserError for a damaged one and for another format."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); restore it from git, or record the run again"
        ) from error
    if not isinstance(content, dict) or "format" not in content:
        raise UserError(f"{path}: is no record of a run; `qexp record` writes one")
    if content["format"] != FORMAT:
        raise UserError(
            f"{path}: has format {content['format']} and this version of qexp reads {FORMAT}; "
            "record the run again, or use the version that wrote it"
        )
    wrong = [key for key, kind in KINDS.items() if not isinstance(content.get(key), kind)]
    files = {} if wrong else content["provenance"].get("inputs")
    if not isinstance(files, dict) or not all(isinstance(each, dict) for each in files.values()):
        wrong = ["provenance.inputs"]
    if wrong:
        raise UserError(
            f"{path}: has no {', '.join(sorted(wrong))} as a record has; restore it from git, or "
            "record the run again"
        )
    return content


def configured(content: Mapping[str, Any]) -> DictConfig:
    """The configuration of a record, which resolves without any other run's folder."""
    return OmegaConf.create({**content["config"], **content["resolved"]})


def packed(layers: Iterable[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Name, bits and error of each linear; linears that differ only in their block are one entry,
    with a list over the blocks and `*` in the name."""
    kinds: dict[str, dict[int, Mapping[str, str]]] = {}
    for row in layers:
        block = BLOCK.search(row["name"])
        name = row["name"] if block is None else BLOCK.sub("*", row["name"], count=1)
        kinds.setdefault(name, {})[-1 if block is None else int(block[0])] = row
    entries = []
    for name, rows in kinds.items():
        entry: dict[str, Any] = {"name": name}
        if "*" in name and list(rows) != list(range(len(rows))):
            entry["blocks"] = list(rows)
        entry["error"] = [float(f"{float(row['error']):.{DIGITS}g}") for row in rows.values()]
        if bits := [float(row["bits"]) for row in rows.values() if row.get("bits")]:
            entry["bits"] = bits[0] if len(set(bits)) == 1 else bits
        entries.append(entry)
    return entries


def layers(content: Mapping[str, Any]) -> Layers:
    """The rows of `packed`: `name`, `error` and `bits`, block by block."""
    rows = []
    for entry in content["layers"]:
        count = len(entry["error"])
        blocks = entry.get("blocks", range(count)) if "*" in entry["name"] else [-1]
        bits = entry.get("bits", "")
        each = bits if isinstance(bits, list) else [bits] * count
        for block, error, stored in zip(blocks, entry["error"], each, strict=True):
            name = entry["name"].replace("*", str(block), 1)
            rows.append((block, {"name": name, "error": str(error), "bits": str(stored)}))
    return [row for _, row in sorted(rows, key=lambda pair: (pair[0] < 0, pair[0]))]


def rendered(value: Any, indent: str = "") -> str:
    """JSON with sorted keys. What fits on a line stands on one, and so does a list of numbers."""
    line = json.dumps(value, sort_keys=True, ensure_ascii=False)
    numbers = isinstance(value, list) and all(isinstance(each, int | float) for each in value)
    if not value or not isinstance(value, dict | list) or numbers:
        return line
    if len(indent) + len(line) < WIDTH and indent:
        return line
    deeper = f"{indent} "
    if isinstance(value, dict):
        parts = [f"{json.dumps(key)}: {rendered(value[key], deeper)}" for key in sorted(value)]
    else:
        parts = [rendered(each, deeper) for each in value]
    first, last = "{}" if isinstance(value, dict) else "[]"
    inside = f",\n{deeper}".join(parts)
    return f"{first}\n{deeper}{inside}\n{indent}{last}"


def unhashed(content: Mapping[str, Any]) -> Sequence[str]:
    """The input files whose content is not known, with which a record answers no job."""
    found = content["provenance"].get("inputs", {})
    return [name for name, entry in found.items() if "sha256" not in entry]
