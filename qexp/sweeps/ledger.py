"""The record of a sweep: the state of each of its jobs, shared by all of its launches.

A sweep is its command. `.sweeps/<digest>/` next to its runs holds one file per job, written whole
by the process that has the job; the same command again, at any time and in any number of processes,
goes on from there.
"""

import hashlib
import json
import os
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from qexp.common import hashes
from qexp.runs.results import write_json
from qexp.runs.signature import UNSIGNED

VARIABLE = "QEXP_SWEEP"  # launchers pass the environment to their workers
FOLDER = ".sweeps"

postponed: set[Path] = set()  # folders that another process had locked


@dataclass(frozen=True)
class Entry:
    """One job of a sweep."""

    overrides: list[str]
    number: int = 0
    status: Literal["planned", "running", "done", "failed"] = "planned"
    folder: str = ""
    reason: str = ""  # of a failure
    started: str = ""
    seconds: float = 0.0
    cost: dict[str, float] = field(default_factory=dict)  # see results.cost
    launch: str = ""  # the launch that runs or ran it
    code: str = ""  # hash of the code that failed


@dataclass(frozen=True)
class Sweep:
    """The record of the jobs of one command, and the launch that this process belongs to."""

    folder: Path
    launch: str

    def __str__(self) -> str:
        return f"{self.folder}@{self.launch}"

    @property
    def name(self) -> str:
        """Also the group in W&B."""
        return self.folder.name

    def entry(self, overrides: Sequence[str], number: int = 0) -> Entry:
        """The entry of a job; a planned one if there is none."""
        return _read(self._path(overrides)) or Entry(list(overrides), number)

    def enter(self, entry: Entry) -> None:
        write_json(self._path(entry.overrides), asdict(entry))

    def entries(self) -> list[Entry]:
        """All entries in the order of the plan; those of a search in the order of time."""
        found = filter(None, map(_read, self.folder.glob("[!.]*.json")))
        return sorted(found, key=lambda entry: (entry.number, entry.started))

    def plan(self, jobs: Sequence[Sequence[str]], retry: str | None) -> None:
        """Enter the new jobs. A job that failed in an earlier launch is planned again with
        `retry=failed`, or after a change of the code."""
        for number, overrides in enumerate(jobs):
            if _read(self._path(overrides)) is None:
                self.enter(Entry(list(overrides), number))
        for entry in self.entries():
            again = retry == "failed" or entry.code != hashes.code()
            if entry.status == "failed" and again and entry.launch != self.launch:
                self.enter(Entry(entry.overrides, entry.number))

    def _path(self, overrides: Sequence[str]) -> Path:
        return self.folder / f"{_digest(signed(overrides))}.json"


def current() -> Sweep | None:
    """The sweep that this job belongs to."""
    folder, _, launch = os.environ.get(VARIABLE, "").rpartition("@")
    return Sweep(Path(folder), launch) if folder else None


def sweep_of(config: DictConfig) -> Sweep:
    """The record of a command, identified by its overrides in any order. Another launch of the same
    process belongs to the first one."""
    name = _digest(signed(_requested_overrides(config)))
    folder = Path(config.hydra.sweep.dir).absolute() / FOLDER / name
    if (known := current()) is not None and known.folder == folder:
        return known
    return Sweep(folder, f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}-{platform.node()}-{os.getpid()}")


def plan_of(config: DictConfig) -> list[list[str]] | None:
    """The overrides of each job; None for a search, whose jobs are not known in advance."""
    if not config.hydra.sweeper._target_.endswith("BasicSweeper"):
        return None
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    parsed = parser.parse_overrides(_requested_overrides(config))
    [jobs] = BasicSweeper.split_arguments(parsed, None)
    return jobs


def summary(sweep: Sweep) -> str:
    """The number of jobs that ran, were answered from disk and failed, with the reasons."""
    jobs = sweep.entries()
    count = Counter(job.status for job in jobs)
    ran = sum(job.status == "done" and job.launch == sweep.launch for job in jobs)
    total = f"{len(jobs)} job{'s' if len(jobs) != 1 else ''}"
    parts = [f"{total}: {ran} ran", f"{count['done'] - ran} answered from disk"]
    if kept := sum(job.status == "done" and job.folder.endswith(".json") for job in jobs):
        parts[-1] += f" ({kept} from records)"
    parts.append(f"{count['failed']} failed")
    if left := count["planned"] + count["running"]:
        parts.append(f"{left} left")
    lines = [", ".join(parts)]
    for job in jobs:
        if job.status == "failed":
            lines.append(f"  failed: {' '.join(job.overrides) or job.folder}\n    {job.reason}")
    return "\n".join(lines)


def signed(overrides: Sequence[str]) -> list[str]:
    """The overrides that can change a number, sorted."""
    return sorted(each for each in overrides if _key(each) not in UNSIGNED)


def started(entry: Entry, sweep: Sweep, folder: Path) -> Entry:
    """The entry of a job that starts now."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    fresh = Entry(entry.overrides, entry.number, "running", str(folder))
    return replace(fresh, started=now, launch=sweep.launch, code=hashes.code())


def _requested_overrides(config: DictConfig) -> list[str]:
    """The parameters that the configuration sweeps, then the overrides of the command line."""
    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    return [f"{key}={value}" for key, value in params.items()] + list(config.hydra.overrides.task)


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0].partition(".")[0]


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]


def _read(path: Path) -> Entry | None:
    """The entry in a file; None where there is none that this version can read."""
    try:
        return Entry(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
