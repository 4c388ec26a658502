"""Whole runs inside this process, from overrides to the files of a folder.

They need the fixture `configured`.
"""

from collections.abc import Sequence
from pathlib import Path

from hydra import compose
from omegaconf import DictConfig, OmegaConf

from qexp import pipeline

SMALL = [
    "data=synthetic",
    "calibration.sequences=6",
    "calibration.length=64",
    "eval.held_out.length=64",
    "eval.held_out.limit=4",
    "weight.group_size=32",
]
PPL = "synthetic_raw_64x4/ppl"


def run(folder: Path, *overrides: str, small: Sequence[str] = SMALL) -> dict[str, float]:
    """The metrics; the folder holds what the command leaves. `small`: overrides that come first."""
    cfg = compose("config", [*small, *overrides])
    (folder / ".hydra").mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, folder / ".hydra" / "config.yaml")
    return answer_or_run(cfg, folder)


def answer_or_run(cfg: DictConfig, folder: Path) -> dict[str, float]:
    """As a job does."""
    if (answer := pipeline.answer(cfg, folder)) is not None:
        return answer.metrics
    return pipeline.run(cfg, folder)
