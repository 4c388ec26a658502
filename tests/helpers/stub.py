"""A pipeline that needs no model; the fixture `qexp` runs the command with it."""

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig

from qexp.common.errors import UserError
from qexp.runs import recorded, results, used_modules
from qexp.runs.provenance import Provenance
from qexp.runs.results import Answer

SMALL = ("model=tiny_llama", "data=synthetic", "calibration=synthetic")


def answer(cfg: DictConfig, folder: Path) -> Answer | None:
    """As the pipeline's, of a run that reads no files."""
    if (metrics := results.read(folder)) is not None:
        return Answer(metrics, folder, results.cost(folder))
    return recorded.answer(cfg, [])


def run(cfg: DictConfig, folder: Path, loggers: Sequence[Logger] = ()) -> dict[str, float]:
    """Fails in a different way for some bit-widths, else a perplexity that tells the config."""
    bits = cfg.weight.bits
    if bits == 11:
        raise UserError("weight.bits=11: is not wanted; ask for another")
    if bits == 12:
        raise KeyError("a fault of the program")
    if bits == 13:
        raise KeyboardInterrupt
    provenance = Provenance(used_modules.roots(cfg))
    with provenance.stage("solve"):
        pass
    provenance.add(protocols={"held_out": {"digest": "12345678"}})
    quantized = {} if cfg.method.get("solver") is None else {"weight/bits": bits + 0.5}
    metrics = {"held_out/ppl": 40.0 - bits + cfg.seed, "held_out/ppl_stderr": 0.5, **quantized}
    for logger in loggers:
        logger.log_metrics(metrics)
    return results.write(folder, metrics, [], provenance)
