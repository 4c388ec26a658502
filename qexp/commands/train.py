"""`qexp train FOLDER`: train a float model and keep its folder."""

import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from qexp.common.errors import UserError
from qexp.models.export import check, export
from qexp.sweeps import app
from qexp.sweeps.job import Objective, job


def main() -> None:
    """`train.py FOLDER [key=value …]`: a run, by default method=finetune, and its model's folder.

    A run that was killed goes on where it was; one that has finished is answered from disk.
    """
    if len(sys.argv) < 2 or sys.argv[1].startswith("-") or "=" in sys.argv[1]:
        raise SystemExit("train.py: the first argument is the folder to write the model to")
    out = Path(sys.argv.pop(1)).absolute()
    if not any(key.startswith(("method=", "experiment=")) for key in sys.argv):
        sys.argv.append("method=finetune")

    def work(cfg: DictConfig) -> Objective:
        settings = HydraConfig.get()
        if settings.mode == RunMode.MULTIRUN or not cfg.save_weights:
            raise UserError("train.py: writes one model, of one run that keeps its weights")
        check(out)
        value = job(cfg)
        export(Path(settings.runtime.output_dir), out)
        return value

    app.main(work)
