"""What became of the jobs of a sweep, whoever launched them."""

import hashlib
import json
import os
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

VARIABLE = "QEXP_SWEEP"  # launchers hand the environment on to their workers


@dataclass(frozen=True)
class Entry:
    """One job of a sweep; `reason` is empty unless it failed."""

    status: Literal["ran", "answered", "failed"]
    folder: str
    overrides: list[str]
    reason: str = ""


class Ledger(Callback):
    """Names a sweep when it starts, so that its jobs know what they belong to."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """The name is the time and a hash of the command; it is also the group in W&B."""
        mark = hashlib.sha256("\0".join([*sys.argv, str(os.getpid())]).encode()).hexdigest()[:4]
        name = f"{datetime.now():%Y%m%d-%H%M%S}-{mark}"
        path = Path(config.hydra.sweep.dir).absolute() / ".sweeps" / f"{name}.jsonl"
        os.environ[VARIABLE] = str(path)


def current() -> Path | None:
    """The ledger of the sweep that this job belongs to."""
    path = os.environ.get(VARIABLE)
    return Path(path) if path else None


def enter(path: Path, entry: Entry) -> None:
    """Append one line; short appends of several processes do not mix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(entry)) + "\n")


def entries(path: Path) -> list[Entry]:
    """The jobs that ended, in the order in which they did."""
    if not path.exists():
        return []
    return [Entry(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def summary(jobs: list[Entry]) -> str:
    """How many jobs ran, were answered from disk and failed, and why those did."""
    count = Counter(job.status for job in jobs)
    total = f"{len(jobs)} job{'s' if len(jobs) != 1 else ''}"
    parts = [f"{total}: {count['ran']} ran", f"{count['answered']} answered from disk"]
    lines = [", ".join([*parts, f"{count['failed']} failed"])]
    for job in jobs:
        if job.status == "failed":
            lines.append(f"  failed: {' '.join(job.overrides) or job.folder}\n    {job.reason}")
    return "\n".join(lines)
