"""Export of a finished run's model as a Hugging Face folder."""

import logging
from pathlib import Path

from qexp.common.errors import UserError
from qexp.common.files import atomic_folder
from qexp.models.from_run import FromRun
from qexp.models.linearize import published
from qexp.packed import weights_file
from qexp.runs import results

log = logging.getLogger(__name__)


def check(out: Path) -> None:
    """UserError where `out` exists and is not an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: already exists; name another folder, or delete it")


def export(run: Path, out: Path) -> None:
    """Write the model and the tokenizer of a finished run atomically, as transformers reads them:
    `model=local model.path=OUT`.

    Raises UserError for what such a folder cannot hold: activation quantizers, and parameters that
    the family does not have.
    """
    check(out)
    results.config(str(run))
    _, others = weights_file.load(run)
    if any(name.startswith("quantizers.") for name in others):
        raise UserError(f"{run}: its activations are quantized, which a model folder cannot hold")
    loaded = FromRun(str(run)).load()
    with atomic_folder(out) as folder:
        loaded.model.save_pretrained(folder, state_dict=published(loaded.model))
        if loaded.tokenizer is not None:
            loaded.tokenizer.save_pretrained(folder)
    log.info("%s: use it as model=local model.path=%s", out, out)
