"""Python interface: runs, sweeps, their models and their numbers, as `qexp.run`, `qexp.sweep` …

Overrides are those of the command line; the same configuration is the same run in the same folder,
whether a command or a function started it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qexp.common.errors import UserError as UserError
from qexp.runs.run import Run as Run

if TYPE_CHECKING:
    import pandas
    from omegaconf import DictConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qexp.sweeps.job import Objective

Place = str | os.PathLike[str]


def run(*overrides: str, config_dir: Place | None = None) -> Run:
    """One run, like `qexp OVERRIDES`: its configuration, metrics, layers and folder.

    A finished run of the same configuration is read from its folder, or from a record.

    Args:
        overrides: `"method=gptq"`, `"weight.bits=3"`, as on the command line.
        config_dir: A folder of your own options, laid out like `conf/`.

    Returns:
        The finished run. `metrics` maps names to numbers, `layers` has one row per linear.

    Raises:
        UserError: A wrong key, choice or value, or a model or text that cannot be used. The message
            is one sentence with the key and what would be right.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from qexp.runs import finished, recorded, results
    from qexp.sweeps import in_process
    from qexp.sweeps.job import job

    seen: list[tuple[DictConfig, Path]] = []

    def work(cfg: DictConfig) -> Objective:
        settings = HydraConfig.get()
        if settings.mode == RunMode.MULTIRUN:
            raise UserError("qexp.run: these overrides start a sweep; call qexp.sweep with them")
        seen.append((cfg, Path(settings.runtime.output_dir)))
        return job(cfg)

    in_process.call(_words(overrides, config_dir), work)
    if not seen:
        raise UserError("qexp.run: nothing ran (dry_run=true); qexp.run needs a result to return")
    [(cfg, folder)] = seen
    own = results.stale(folder) is None  # else a record answered
    return finished.load(folder if own else recorded.lookup(cfg).path or folder)


def sweep(
    *overrides: str, allow_failures: bool = False, config_dir: Place | None = None
) -> list[Run]:
    """One run for each combination of the listed values, like `qexp -m OVERRIDES`.

    The same call resumes a sweep that was interrupted, and reads what is finished from disk.

    Args:
        overrides: `"method=rtn,gptq"`, `"weight.bits=2,3,4"`; also a launcher, or a search.
        allow_failures: Leave out the jobs that failed. Their reasons are in the log and in the
            `failure.json` of their folders.
        config_dir: A folder of your own options, laid out like `conf/`.

    Returns:
        The finished runs in the order of their jobs.

    Raises:
        UserError: A wrong override; and, without `allow_failures`, after all jobs, if any of them
            failed: a summary with the reasons.
    """
    from qexp.runs import finished
    from qexp.sweeps import in_process, ledger

    in_process.call(["-m", *_words(overrides, config_dir)])
    current = ledger.current()
    if current is None:
        return []  # a dry run
    jobs = current.entries()
    if not allow_failures and any(job.status != "done" for job in jobs):
        raise UserError(ledger.summary(current))
    return [finished.load(Path(job.folder)) for job in jobs if job.status == "done"]


def load(folder: Place, device: str = "cpu") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a finished run with its quantized weights, and its tokenizer.

    Weights are the dequantized codes of `weights.safetensors`, in the dtype of the run. Activation
    quantizers and online maps of the run are attached, so that the model computes what the run
    measured. `model.generate` works without a key-value cache unless `use_cache=True` is passed.

    Args:
        folder: Of a finished run that kept its weights (`save_weights=true`, the default).
        device: `"cpu"`, `"cuda"`, `"cuda:1"`, or `"auto"`.

    Returns:
        A model of transformers in eval mode, and its tokenizer (None for images and models
        without one).

    Raises:
        UserError: The folder holds no finished run, or one without weights, or it is a record.
    """
    from omegaconf import OmegaConf

    from qexp.models.device import as_task
    from qexp.models.from_run import FromRun
    from qexp.runs import resolvers

    resolvers.register()
    source = FromRun(os.fspath(folder))
    loaded = source.loaded()
    task = as_task(source, loaded, OmegaConf.create({"device": device, "offload": False}))
    loaded.finish(task)
    return task.model, loaded.tokenizer


def runs(*folders: Place, keys: Sequence[str] | None = None) -> pandas.DataFrame:
    """Finished runs and records below some folders, one row each.

    The columns are `folder`, settings by their keys, `seconds`, and every metric. Two protocols of
    the same name with different definitions have two columns, with their digests in the heading:
    their numbers are not comparable.

    Args:
        folders: Of runs, of sweeps, or of records; `outputs` by default.
        keys: Settings that get a column, such as `"method"` or `"weight.bits"`. By default `model`,
            `method`, `weight.bits`, and whatever distinguishes the runs.

    Raises:
        UserError: A folder does not exist.
    """
    from qexp.report.frame import frame
    from qexp.runs import finished

    found, _ = finished.collect(Path(folder) for folder in folders or ["outputs"])
    return frame(found, keys)


def _words(overrides: Sequence[str], config_dir: Place | None) -> list[str]:
    """The arguments of the command. UserError for what is no override."""
    for word in overrides:
        if word.startswith("-") or ("=" not in word and not word.startswith("~")):
            raise UserError(f"{word}: is no override; give key=value, as weight.bits=3")
    if config_dir is None:
        return list(overrides)
    if not Path(config_dir).is_dir():
        raise UserError(f"config_dir: {config_dir} is no folder; give one with options of yours")
    return ["--config-dir", os.fspath(config_dir), *overrides]
