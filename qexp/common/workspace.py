"""Workspace of a run: its folder while it works, and the clean-up once its results are written."""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qexp.common.files import write_rows

CHECKPOINTS = "training-"  # prefix of the folders from which killed training resumes


class Workspace:
    """The folder of a run, or None outside of one, the loggers of Lightning that get its metrics,
    and what is removed once its results exist."""

    def __init__(
        self,
        folder: Path | None = None,
        memory: float | None = None,
        loggers: Sequence[Any] = (),
    ) -> None:
        """memory: GiB of calibration activations that a walk over the blocks holds in memory; null:
        all of them."""
        self.folder, self.loggers = folder, loggers
        self.memory = math.inf if memory is None else memory * 2**30
        self._removals: list[Callable[[], object]] = []
        self._trainings: dict[str, int] = {}
        self._logs: dict[Path, dict[int, Sequence[Mapping[str, object]]]] = {}

    def log(self, path: Path, training: str, rows: Sequence[Mapping[str, object]]) -> None:
        """Write a CSV file with the rows of this training so far, after those of the trainings that
        came before it in the run. In a run with several, a column `training` numbers them."""
        number = self._trainings.setdefault(training, len(self._trainings) + 1)
        parts = self._logs.setdefault(path, {})
        parts[number] = rows
        if len(self._trainings) > 1:
            rows = [{"training": n, **row} for n, part in parts.items() for row in part]
        write_rows(path, rows)

    def remove_when_done(self, remove: Callable[[], object]) -> None:
        """Call `remove` once the run's results are on disk; immediately where there is no run."""
        self._removals.append(remove)
        if self.folder is None:
            self.clear()

    def clear(self) -> None:
        """Remove the files from which the run could resume; its results are on disk."""
        while self._removals:
            self._removals.pop()()
        if self.folder is not None:  # also checkpoints of an earlier attempt with other code
            for leftover in self.folder.glob(f"{CHECKPOINTS}*"):
                shutil.rmtree(leftover, ignore_errors=True)
