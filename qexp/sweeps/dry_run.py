"""Dry runs (`--dry-run`): the state of each job and an estimate of its seconds."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from qexp.common import cache_entries
from qexp.common.errors import UserError
from qexp.common.files import locked
from qexp.runs import finished, record, recorded, results
from qexp.sweeps.ledger import Entry, Sweep

RECENT = 100  # newest finished runs that an estimate uses
WORK = ("method._target_", "transform._target_")  # runs that differ in these are not compared


@dataclass(frozen=True)
class FinishedRun:
    """A finished run: its settings by dotted key, and its seconds."""

    settings: dict[str, Any]
    seconds: float


@dataclass(frozen=True)
class JobPlan:
    """The state of a job; if it must run, estimated seconds where a similar run has finished, and
    its memory where the shapes of the model are known."""

    folder: Path
    name: str
    state: str
    seconds: float | None
    memory: str | None = None

    def __str__(self) -> str:
        known = [] if self.seconds is None else [f"about {self.seconds:.0f} s"]
        known += [] if self.memory is None else [self.memory]
        about = f" ({', '.join(known)})" if known else ""
        return f"{os.path.relpath(self.folder)}  {self.name}: {self.state}{about}"


def format_plan(
    config: DictConfig, jobs: Sequence[Sequence[str]] | None, sweep: Sweep | None
) -> str:
    """A line per job: its state, an estimate where it is to run, its folder and overrides.

    jobs: None for a search, of which only what was tried is known.
    """
    top = Path(OmegaConf.select(config, "hydra.sweep.dir" if sweep else "hydra.run.dir"))
    past = finished_runs(top if sweep else top.parent, config.records)
    search = jobs is None
    if jobs is None:
        jobs = [entry.overrides for entry in sweep.entries()] if sweep else []
    shared = set.intersection(*map(set, jobs)) if len(jobs) > 1 else set()
    plans = []
    for overrides in jobs:
        cfg, folder = composed(config, overrides)
        entry = sweep.entry(overrides) if sweep else Entry(list(overrides))
        own = " ".join(each for each in overrides if each not in shared)
        plans.append(plan(cfg, folder, own, past, entry, config.retry))
    lines = [str(each) for each in plans]
    if search:
        seconds = estimate(_settings(config), past)
        about = f", about {seconds:.0f} s each" if seconds is not None else ""
        lines.append(f"a search of {config.hydra.sweeper.n_trials} trials{about}")
    return "\n".join([*lines, total(plans, len(past)), cache_entries.summary()])


def plan(
    cfg: DictConfig,
    folder: Path,
    name: str,
    past: Sequence[FinishedRun],
    entry: Entry | None = None,
    retry: str | None = None,
) -> JobPlan:
    """The state of one job. `entry`: its entry in the record of a sweep."""
    state = _state(cfg, folder, entry or Entry([]), retry)
    to_run = state.startswith("to run")
    if not to_run:
        return JobPlan(folder, name, state, None)
    return JobPlan(folder, name, state, estimate(_settings(cfg), past), _memory(cfg))


def _memory(cfg: DictConfig) -> str | None:
    from qexp.models import footprint  # imports torch, which a job that is answered does not need

    try:
        found = footprint.of(cfg)
    except UserError:  # the job will say it
        return None
    return None if found is None else str(found)


def composed(config: DictConfig, overrides: Sequence[str]) -> tuple[DictConfig, Path]:
    """The configuration of one job, as the launcher composes it, and its folder."""
    single = config.hydra.mode != RunMode.MULTIRUN
    loader = GlobalHydra.instance().config_loader()
    cfg = config if single else loader.load_sweep_config(config, list(overrides))
    HydraConfig.instance().set_config(cfg)
    if single:
        return cfg, Path(cfg.hydra.run.dir)
    return cfg, Path(cfg.hydra.sweep.dir) / cfg.hydra.sweep.subdir


def finished_runs(top: Path, records: str | None = None) -> list[FinishedRun]:
    """The newest finished runs and records at any depth; unreadable ones are left out."""
    paths = [*top.rglob(results.METRICS)]
    if records is not None:
        paths += Path(records).rglob(record.NAMES)
    newest = sorted(paths, key=os.path.getmtime, reverse=True)[:RECENT]
    found, _ = finished.collect(p.parent if p.name == results.METRICS else p for p in newest)
    return [FinishedRun(_hashable(run.leaves), run.seconds) for run in found]


def estimate(settings: dict[str, Any], past: Sequence[FinishedRun]) -> float | None:
    """Median seconds of the runs that differ in the fewest keys; None without a run of the same
    method and transform."""
    alike = [run for run in past if all(run.settings.get(k) == settings.get(k) for k in WORK)]
    apart = [len(settings.items() ^ run.settings.items()) for run in alike]
    near = [run.seconds for run, keys in zip(alike, apart, strict=True) if keys == min(apart)]
    return median(near) if near else None


def _settings(cfg: DictConfig) -> dict[str, Any]:
    kept = [str(key) for key in cfg if key not in finished.NOT_SETTINGS]
    content: Any = OmegaConf.to_container(OmegaConf.masked_copy(cfg, kept))
    return _hashable(finished.flat(content))


def _hashable(leaves: dict[str, Any]) -> dict[str, Any]:
    return {key: str(value) for key, value in leaves.items()}


def _state(cfg: DictConfig, folder: Path, entry: Entry, retry: str | None) -> str:
    needs = [results.WEIGHTS] if cfg.save_weights else []
    if folder.is_dir() and (reason := results.stale(folder, needs=needs)) is None:
        return "answered"
    if entry.status == "failed" and retry is None:
        return f"failed ({entry.reason})"
    if entry.status == "running":
        with locked(Path(entry.folder), wait=False) as free:
            return "to run (killed)" if free else "running"
    found = recorded.lookup(cfg)
    if found.path is not None:
        return f"answered from record {found.path}{found.note}"
    if entry.status == "failed":
        return "to run (failed)"
    stood = folder.is_dir() and (folder / results.METRICS).exists()
    reasons = [*([str(reason)] if stood else []), *([found.reason] if found.reason else [])]
    return f"to run ({'; '.join(reasons)})" if reasons else "to run"


def total(plans: Sequence[JobPlan], known: int) -> str:
    """The number of jobs to run and their seconds; `known`: finished runs behind the estimate."""
    running = sum(each.state.startswith("to run") for each in plans)
    parts = [f"{len(plans)} job{'s' if len(plans) != 1 else ''}: {running} to run"]
    if estimates := [each.seconds for each in plans if each.seconds is not None]:
        about = f"about {sum(estimates):.0f} s one after another"
        parts.append(f"{about}, by the nearest of {known} finished runs")
        if unlike := running - len(estimates):
            parts.append(f"{unlike} like none of them")
    return ", ".join(parts)
