"""Finished runs, read from their folders or from records."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from qexp.common.errors import UserError
from qexp.runs import record, resolvers, results
from qexp.runs.portable import portable
from qexp.runs.run import NOT_SETTINGS as NOT_SETTINGS
from qexp.runs.run import Column as Column
from qexp.runs.run import Run as Run
from qexp.runs.run import flat as flat
from qexp.runs.run import word as word
from qexp.runs.signature import without_defaults


def load(folder: Path) -> Run:
    """The run in one folder, or in the file of a record. Raises UserError if it is incomplete or
    unreadable."""
    if not folder.is_dir():
        return _recorded(folder)
    try:
        config = results.written_config(folder)
        overrides, chosen = results.overrides(folder), results.choices(folder)
        written, content = _trees(config, config)
    except Exception as error:  # yaml, OmegaConf and the file system raise different exceptions
        raise UserError(f"{folder / '.hydra'}: cannot be read ({error})") from error
    return _run(
        folder,
        chosen,
        content,
        written,
        overrides,
        results.metrics(folder),
        results.provenance(folder),
    )


def _recorded(path: Path) -> Run:
    kept = record.read(path)
    try:
        written, content = _trees(OmegaConf.create(kept["config"]), record.configured(kept))
        return _run(
            path,
            kept["choices"],
            content,
            written,
            kept["overrides"],
            kept["metrics"],
            kept["provenance"],
            record.layers(kept),
        )
    except Exception as error:  # keys were edited by hand
        raise UserError(f"{path}: is damaged ({error!r}); restore it from git") from error


def _trees(written: Any, config: Any) -> tuple[Any, Any]:
    """The configuration as written and resolved."""
    resolvers.register()
    return OmegaConf.to_container(written), OmegaConf.to_container(config, resolve=True)


def _run(
    folder: Path,
    choices: Mapping[str, str],
    config: dict[str, Any],
    written: dict[str, Any],
    overrides: Sequence[str],
    metrics: Mapping[str, float],
    provenance: dict[str, Any],
    layers: record.Layers | None = None,
) -> Run:
    """In the order of their names: a table is the same whether a folder or a record is read."""
    leaves = flat(without_defaults(written), without=NOT_SETTINGS)
    return Run(
        folder=folder,
        choices=dict(sorted(choices.items())),
        config=config,
        leaves=dict(sorted(leaves.items())),
        overrides=tuple(overrides),
        metrics={name: float(metrics[name]) for name in sorted(metrics)},
        provenance=provenance,
        kept_layers=layers,
    )


def collect(folders: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """Finished runs and records at any depth, in table order, and a note for each that is left out.

    A record of a run whose folder is there, or a copy of another record, is left out without a
    note: it is the same run.
    """
    runs: dict[Path, Run] = {}
    notes = []
    for top in folders:
        if not top.exists():
            raise UserError(
                f"{top}: is not a folder or a record; name the folder of a run, of a sweep or of "
                "records"
            )
        for path in _places(top):
            if path.resolve() in runs:
                continue
            if path.is_dir() and not (path / results.METRICS).exists():
                reason = f" ({failed})" if (failed := failure(path)) else ""
                notes.append(f"{path}: left out, it did not finish{reason}")
                continue
            try:
                runs[path.resolve()] = load(path)
            except UserError as error:
                notes.append(f"{path}: left out, {error}")
    once: dict[Any, Run] = {}
    for run in sorted(runs.values(), key=lambda run: run.recorded):
        same = (
            str(run.provenance.get("finished")),
            json.dumps([run.metrics, portable(run.overrides)]),
        )
        once.setdefault(same if run.recorded or same not in once else run.folder, run)
    return sorted(once.values(), key=_order), notes


def _places(top: Path) -> list[Path]:
    """The folders of runs and the files of records."""
    if top.is_file():
        return [top]
    folders = [path.parent for path in sorted([top / ".hydra", *top.rglob(".hydra")])]
    records = [path for path in sorted(top.rglob(record.NAMES)) if not _hidden(path, top)]
    return [folder for folder in folders if (folder / ".hydra").is_dir()] + records


def _hidden(path: Path, top: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(top).parts)


def _order(run: Run) -> tuple[Any, ...]:
    """Baselines first, then by method, with decreasing bits."""
    bits = run.metrics.get("weight/bits", math.inf)
    names = [run.choices.get(group, "") for group in ("model", "data", "activation", "method")]
    return (*names[:2], not run.is_float, *names[2:], -bits, str(run.folder))


def failure(folder: Path) -> str:
    """Why the run failed; empty where no reason was recorded."""
    try:
        return str(json.loads((folder / "failure.json").read_text())["reason"])
    except (OSError, ValueError, KeyError):
        return ""
