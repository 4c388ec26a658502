"""Result files of a run's folder: written atomically, reused, and checked for staleness."""

import csv
import json
import logging
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import DictConfig, OmegaConf

from qexp.common import modules
from qexp.common.errors import UserError
from qexp.common.files import atomic
from qexp.runs.moved import renamed
from qexp.runs.provenance import Provenance, stamp

METRICS = "metrics.json"
PROVENANCE = "provenance.json"
WEIGHTS = "weights.safetensors"
CONFIGS = ".hydra"  # where Hydra itself would put them
LAYERS = "layers.csv"
TRAINING = "training.csv"  # training metrics, one line per interval
TENSORS = "training_tensors.csv"  # one line per interval and tensor
BLOCKS = "training_blocks.csv"  # block-wise training, one line per epoch
COLUMNS = (
    *("name", "rows", "columns", "bits", "paper_bits", "option"),
    *("error_before", "error", "damp", "seconds"),
)

log = logging.getLogger(__name__)


def read(
    folder: Path, inputs: Sequence[Path] | None = None, needs: Sequence[str] = ()
) -> dict[str, float] | None:
    """The metrics of a finished run, or None, with the reason in the log, where it must run again.

    inputs: the local files that the run would read now; None trusts the recorded list.
    needs: files that must also be in the folder, such as the weights.
    """
    if not (folder / METRICS).exists():
        return None
    reason = stale(folder, inputs, needs)
    if reason is not None:
        log.info("%s runs again: %s", folder.name, reason)
        return None
    log.info("answered from disk (%s)", folder.name)
    return metrics(folder)


def stale(
    folder: Path, inputs: Sequence[Path] | None = None, needs: Sequence[str] = ()
) -> str | None:
    """Why the stored result cannot be reused; None where it can. Arguments as for `read`."""
    if not (folder / METRICS).exists():
        return "it did not finish"
    try:
        metrics(folder)
        record = provenance(folder)
    except UserError as error:
        return str(error)
    used = record.get("modules", {})  # a change elsewhere, as in a report, changes no number
    if used.get("digest") != modules.sources().digest(used.get("roots", [])):
        return "the code has changed since"
    recorded: dict[str, Any] = record.get("inputs", {})
    if inputs is not None and {str(path) for path in inputs} != set(recorded):
        return "it reads other files now"
    for name, seen in recorded.items():
        if stamp(Path(name)) != seen:
            return f"{name} has changed since"
    for name in needs:
        if not (folder / name).exists():
            return f"it has no {name}"
    return None


def metrics(folder: Path) -> dict[str, float]:
    """The content of `metrics.json`; NaN and infinity are read as Python's JSON writes them."""
    return {name: float(value) for name, value in _json(folder / METRICS).items()}


def provenance(folder: Path) -> dict[str, Any]:
    """The content of `provenance.json`."""
    return _json(folder / PROVENANCE)


def config(folder: str | None) -> DictConfig:
    """The configuration of a finished run. Raises UserError where the folder holds none."""
    if folder is None:
        raise UserError("run: has no value; give the folder of a finished run, run=outputs/…")
    path = Path(folder) / CONFIGS / "config.yaml"
    if Path(folder).is_file():
        raise UserError(
            f"run={folder}: is a file, and a record keeps no weights; run its configuration again "
            "with save_weights=true (its `overrides` say which) and give that folder"
        )
    if not path.is_file():
        raise UserError(f"run={folder}: has no {CONFIGS}/config.yaml; give the folder of a run")
    if not (Path(folder) / METRICS).is_file():
        raise UserError(f"run={folder}: has no {METRICS}; that run did not finish")
    written = path.stat()
    return deepcopy(_read(path, (written.st_mtime_ns, written.st_size, written.st_ino)))


# a run that starts from another asks several times, and OmegaConf takes 0.1 s to read it
@lru_cache(maxsize=8)
def _read(path: Path, written: tuple[int, ...]) -> DictConfig:
    """The configuration in a file, with today's keys. `written` changes where the file does."""
    loaded = OmegaConf.create(renamed(OmegaConf.to_container(OmegaConf.load(path))))
    assert isinstance(loaded, DictConfig)
    return loaded


def written_config(folder: Path) -> DictConfig:
    """The configuration in a run's folder as it was written."""
    loaded = OmegaConf.load(folder / CONFIGS / "config.yaml")
    assert isinstance(loaded, DictConfig)
    return loaded


def overrides(folder: Path) -> list[str]:
    """The overrides of the run's command."""
    return [str(override) for override in OmegaConf.load(folder / CONFIGS / "overrides.yaml")]


def choices(folder: Path) -> dict[str, str]:
    """The option chosen for each config group."""
    # Hydra's settings are long, and OmegaConf's reader of yaml is slow
    reader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    settings = yaml.load((folder / CONFIGS / "hydra.yaml").read_text(encoding="utf-8"), reader)
    options = settings["hydra"]["runtime"]["choices"] or {}
    return {str(group): str(option) for group, option in options.items()}


def layers(folder: Path) -> list[dict[str, str]]:
    """The rows of `layers.csv`; empty where the run quantized nothing."""
    try:
        with (folder / LAYERS).open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except OSError:
        return []


def write_config(folder: Path, cfg: DictConfig, settings: DictConfig) -> None:
    """Write the configuration of a run, Hydra's settings (the node `hydra`) and the overrides."""
    overrides = settings.hydra.overrides.task
    for name, content in (("config", cfg), ("hydra", settings), ("overrides", overrides)):
        with atomic(folder / CONFIGS / f"{name}.yaml") as path:
            path.write_text(OmegaConf.to_yaml(content), encoding="utf-8")


class Answer(NamedTuple):
    """The result of a job that need not run."""

    metrics: dict[str, float]
    place: Path  # the run's folder, or a record
    cost: dict[str, float]  # see `total_cost`


def cost(folder: Path) -> dict[str, float]:
    """The cost of a finished run, see `total_cost`."""
    return total_cost(provenance(folder))


def total_cost(provenance: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of all stages, peak memory in bytes."""
    stages: list[dict[str, float]] = list(provenance.get("stages", {}).values())
    totals = {"seconds": sum((stage["seconds"] for stage in stages), 0.0)}
    for key in ("peak_rss_bytes", "peak_cuda_bytes"):
        if peaks := [stage[key] for stage in stages if key in stage]:
            totals[key] = float(max(peaks))
    return totals


def write(
    folder: Path,
    metrics: Mapping[str, float],
    records: Sequence[Any],
    provenance: Provenance,
) -> dict[str, float]:
    """Write the results of a run. `metrics.json` is written last: its presence means finished.

    records: of class `qexp.step.Record` (importing it here would import torch for --help).

    Metrics are checked before anything is written. Infinity and NaN (the standard error of a single
    window) are allowed and written as Python's JSON does. Raises TypeError for any non-number.
    """
    numbers = {name: _number(name, value) for name, value in metrics.items()}
    (folder / METRICS).unlink(missing_ok=True)  # unfinished until all files are new
    with (
        atomic(folder / LAYERS) as path,
        path.open("w", newline="", encoding="utf-8") as file,
    ):
        table = csv.DictWriter(file, fieldnames=COLUMNS)
        table.writeheader()
        table.writerows({key: getattr(record, key) for key in COLUMNS} for record in records)
    write_json(folder / PROVENANCE, provenance.dict())
    write_json(folder / METRICS, numbers)
    return numbers


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically; values of other types are written as their string."""
    with atomic(path) as temporary:
        text = json.dumps(content, indent=2, default=str, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"metric {name} is {value!r}, not a number") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete its folder and run again") from (
            error
        )
    if not isinstance(content, dict):
        raise UserError(f"{path}: is not a JSON object; delete its folder and run again")
    return content
