"""Checkpoints of a training run."""

import logging
import pickle
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from qexp.common import ranks

log = logging.getLogger(__name__)

LAST, BEST = "last.ckpt", "best.ckpt"


class Checkpoints(NamedTuple):
    """What a run that was killed has left: its last checkpoint, and its best where it validates."""

    last: dict[str, Any]
    best: dict[str, Any] | None


def find_checkpoints(kept: Path) -> Checkpoints | None:
    """None where there is nothing; what cannot be read is told of and taken away."""
    if not (kept / LAST).exists():
        return None
    try:
        best = _load(kept / BEST) if (kept / BEST).exists() else None
        return Checkpoints(_load(kept / LAST), best)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as reason:
        said = str(reason).partition("\n")[0]
        log.warning("%s: cannot be read (%s); training begins anew", kept, said)
        if not ranks.rank():
            shutil.rmtree(kept, ignore_errors=True)
        return None


def _load(path: Path) -> dict[str, Any]:
    """A checkpoint, of whose tensors only what is used is read."""
    kept: dict[str, Any] = torch.load(path, weights_only=False, mmap=True)
    return kept


class Checkpoint(ModelCheckpoint):
    """One file, written anew after every leg, or after those in which `monitor` is least so far,
    also in a run whose folder was moved meanwhile."""

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
        """Lightning forgets the best one where the folder is another than it was."""

        def here(path: str) -> str:
            return str(Path(str(self.dirpath)) / Path(path).name) if path else path

        paths = ("best_model_path", "kth_best_model_path", "last_model_path")
        moved = {key: here(state_dict[key]) for key in paths if key in state_dict}
        best = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict(
            {**state_dict, **moved, "best_k_models": best, "dirpath": self.dirpath}
        )
