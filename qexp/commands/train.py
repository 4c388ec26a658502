"""Command `qexp train FOLDER`: training of a float model, and export of its folder."""

import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from qexp.common.errors import UserError
from qexp.models.export import check, export
from qexp.sweeps import app
from qexp.sweeps.job import Objective, job


def main(arguments: Sequence[str]) -> None:
    """`qexp train FOLDER [key=value …]`: a run, by default method=finetune, and its model's folder.

    A killed run resumes; a finished one is answered from disk.
    """
    if not arguments or arguments[0].startswith("-") or "=" in arguments[0]:
        raise UserError("train: the first argument is the folder to write the model to")
    out, overrides = Path(arguments[0]).absolute(), list(arguments[1:])
    if not any(key.startswith(("method=", "experiment=")) for key in overrides):
        overrides.append("method=finetune")

    def work(cfg: DictConfig) -> Objective:
        settings = HydraConfig.get()
        if settings.mode == RunMode.MULTIRUN or not cfg.save_weights:
            raise UserError("train: writes one model, of one run that keeps its weights")
        check(out)
        value = job(cfg)
        export(Path(settings.runtime.output_dir), out)
        return value

    sys.argv = ["qexp", *overrides]  # Hydra reads them there
    app.main(work)
