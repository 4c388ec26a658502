"""Checkpoint files of training, and their discovery for resuming."""

import logging
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from qexp.common import ranks
from qexp.common.cache import checksum
from qexp.task import Batch, Task

log = logging.getLogger(__name__)

LAST, BEST = "last.ckpt", "best.ckpt"


class Checkpoints(NamedTuple):
    """Checkpoints of an earlier run: the last, and with validation the best."""

    last: dict[str, Any]
    best: dict[str, Any] | None


def find_checkpoints(folder: Path) -> Checkpoints | None:
    """The checkpoints in a folder, None if there are none.

    A folder with an unreadable checkpoint is deleted with a warning.
    """
    if not (folder / LAST).exists():
        return None
    try:
        best = _load(folder / BEST) if (folder / BEST).exists() else None
        return Checkpoints(_load(folder / LAST), best)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as reason:
        summary = str(reason).partition("\n")[0]
        log.warning("%s: cannot be read (%s); training starts again from step 0", folder, summary)
        if not ranks.rank():
            shutil.rmtree(folder, ignore_errors=True)
        return None


def _load(path: Path) -> dict[str, Any]:
    """A checkpoint with memory-mapped tensors, so that unused ones are not read."""
    content: dict[str, Any] = torch.load(path, weights_only=False, mmap=True)
    return content


class Checkpoint(ModelCheckpoint):
    """One file, overwritten after each interval, or only when `monitor` reaches a new minimum.

    Unlike Lightning's callback it can be resumed after the run's folder was moved.
    """

    def __init__(self, path: Path, monitor: str | None = None) -> None:
        super().__init__(
            dirpath=path.parent,
            filename=path.stem,
            monitor=monitor,
            save_top_k=1,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Replaces the old folder by the new one: Lightning drops the best score otherwise."""

        def relocate(path: str) -> str:
            return str(Path(str(self.dirpath)) / Path(path).name) if path else path

        paths = ("best_model_path", "kth_best_model_path", "last_model_path")
        moved = {key: relocate(state_dict[key]) for key in paths if key in state_dict}
        best = {relocate(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict(
            {**state_dict, **moved, "best_k_models": best, "dirpath": self.dirpath}
        )


def origin_of(task: Task, batches: Sequence[Batch]) -> str:
    """What a result depends on, method aside: checksums of the model's weights, its online maps and
    the data."""
    states = [dict(module.state_dict()) for module in (task.model, task.maps)]
    return f"{task.maps!r} " + "".join(map(checksum, [*states, *batches]))
