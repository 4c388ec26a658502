"""The model that a run left, as a Hugging Face folder; and training that ends in one."""

import logging
import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from qexp import app, store
from qexp.errors import UserError
from qexp.files import atomic_folder
from qexp.job import Objective, job
from qexp.load import published
from qexp.models.run import Run

log = logging.getLogger(__name__)


def check(out: Path) -> None:
    """UserError where something stands that a folder of ours would replace."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: stands already; name another folder, or delete it")


def export(run: Path, out: Path) -> None:
    """Write the model and the tokenizer of a finished run, whole or not at all, as transformers
    reads them: `model=local model.path=OUT`.

    Raises UserError for what such a folder cannot hold: quantizers of activations, and parameters
    that the family does not have.
    """
    check(out)
    _, others = store.load(run)
    if any(name.startswith("quantizers.") for name in others):
        raise UserError(f"{run}: its activations are quantized, which no model folder can say")
    loaded = Run(str(run)).load()
    with atomic_folder(out) as folder:
        loaded.model.save_pretrained(folder, state_dict=published(loaded.model))
        if loaded.tokenizer is not None:
            loaded.tokenizer.save_pretrained(folder)
    log.info("%s: use it as model=local model.path=%s", out, out)


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
