"""A run's folder: written whole, answered from again, refused when stale."""

import csv
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from qexp.common import hashes
from qexp.common.errors import UserError
from qexp.common.files import atomic
from qexp.runs.moved import renamed
from qexp.runs.provenance import Provenance, stamp

METRICS = "metrics.json"
PROVENANCE = "provenance.json"
WEIGHTS = "weights.safetensors"
CONFIGS = ".hydra"  # where Hydra itself would put them
LAYERS = "layers.csv"
TRAINING = "training.csv"  # of what was trained, a line per leg
TENSORS = "training_tensors.csv"  # a line per leg and tensor
BLOCKS = "training_blocks.csv"  # of blocks that were trained one by one, a line per epoch
COLUMNS = (
    *("name", "rows", "columns", "bits", "paper_bits"),
    *("error_before", "error", "damp", "seconds"),
)

log = logging.getLogger(__name__)


def read(
    folder: Path, inputs: Sequence[Path] | None = None, needs: Sequence[str] = ()
) -> dict[str, float] | None:
    """The metrics of a finished run, or None (with the reason in the log) when it must run.

    `inputs`: the local files the run would read now; None trusts the list it recorded.
    `needs`: files that must stand in the folder too, such as the weights.
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
    """Why the folder does not answer for its configuration; None when it does."""
    if not (folder / METRICS).exists():
        return "it did not finish"
    try:
        metrics(folder)
        past = provenance(folder)
    except UserError as error:
        return str(error)
    if past.get("code") != hashes.code():
        return "the code has changed since"
    recorded: dict[str, Any] = past.get("inputs", {})
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
    """What `metrics.json` says; a number that is not finite is a float as in Python's JSON."""
    return {name: float(value) for name, value in _json(folder / METRICS).items()}


def provenance(folder: Path) -> dict[str, Any]:
    """What `provenance.json` says."""
    return _json(folder / PROVENANCE)


def config(folder: str | None) -> DictConfig:
    """The configuration of a finished run. Raises UserError when the folder holds none."""
    if folder is None:
        raise UserError("run: has no value; give the folder of a finished run, run=outputs/…")
    path = Path(folder) / CONFIGS / "config.yaml"
    if not path.is_file():
        raise UserError(f"run={folder}: has no {CONFIGS}/config.yaml, so it is no run's folder")
    if not (Path(folder) / METRICS).is_file():
        raise UserError(f"run={folder}: has no {METRICS}; that run did not finish")
    loaded = OmegaConf.create(renamed(OmegaConf.to_container(OmegaConf.load(path))))
    assert isinstance(loaded, DictConfig)
    return loaded


def write_config(folder: Path, cfg: DictConfig, settings: DictConfig) -> None:
    """The configuration of a run, Hydra's own settings (`hydra:` and below) and the overrides."""
    overrides = settings.hydra.overrides.task
    for name, content in (("config", cfg), ("hydra", settings), ("overrides", overrides)):
        with atomic(folder / CONFIGS / f"{name}.yaml") as path:
            path.write_text(OmegaConf.to_yaml(content), encoding="utf-8")


def cost(folder: Path) -> dict[str, float]:
    """What a finished run took: seconds of all its stages, peaks of memory in bytes."""
    stages: list[dict[str, float]] = list(provenance(folder).get("stages", {}).values())
    found = {"seconds": sum((stage["seconds"] for stage in stages), 0.0)}
    for key in ("peak_rss_bytes", "peak_cuda_bytes"):
        if peaks := [stage[key] for stage in stages if key in stage]:
            found[key] = float(max(peaks))
    return found


def write(
    folder: Path,
    metrics: Mapping[str, float],
    records: Sequence[Any],
    provenance: Provenance,
) -> dict[str, float]:
    """Write the results of a run; `metrics.json` comes last, and its presence means finished.

    `records` are `qexp.methods.step.Record`s (naming the class here would bring torch to --help).

    Metrics are checked before anything is written: each must be a number. Infinity and NaN (the
    spread over a single window) are numbers here and stand in the file as Python's JSON has them.
    """
    numbers = {name: _number(name, value) for name, value in metrics.items()}
    (folder / METRICS).unlink(missing_ok=True)  # until all is new, nothing is finished
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
    """A JSON file, whole or absent; what JSON does not know is written as its string."""
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
