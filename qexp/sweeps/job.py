"""One job of the command: locked, entered in the record of its sweep, answered or run."""

import contextlib
import logging
import math
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from qexp.common import ranks
from qexp.common.errors import UserError
from qexp.common.files import locked
from qexp.config import messages
from qexp.runs import resolvers, results
from qexp.sweeps import gpu_pool, ledger
from qexp.sweeps.failures import REPORTED, message_for, needs_traceback
from qexp.sweeps.ledger import Entry, Sweep

log = logging.getLogger(__name__)

FAILURE = "failure.json"

Objective = float | tuple[float | None, ...] | None

resolvers.register()
gpu_pool.register()  # on import: a launcher's worker names the folder before the job


def job(cfg: DictConfig) -> Objective:
    """One run; its value is the metric, or the metrics, that a search minimizes.

    A failure is logged and written to `failure.json`, then raised, so that Hydra counts the job as
    failed and continues with the next one.
    """
    from qexp import pipeline
    from qexp.common import launch

    settings = HydraConfig.get()
    folder = Path(settings.runtime.output_dir)
    if settings.mode == RunMode.RUN and "SLURM_NTASKS" in os.environ:
        launch.adopt_slurm(cfg.trainer.devices, cfg.trainer.strategy)
    if ranks.rank():
        _join(cfg, folder)
        return None
    overrides = list(settings.overrides.task)
    sweep = ledger.current() if settings.mode == RunMode.MULTIRUN else None
    number = settings.job.num if sweep is not None else 0
    entry = Entry(overrides, number) if sweep is None else sweep.entry(overrides, number)
    start = time.perf_counter()
    try:
        if sweep is not None:
            _admit(sweep, entry, cfg.fail_fast)
        # a job that another process runs is postponed while this process has other jobs
        wait = sweep is None or not _serial(settings) or folder in ledger.postponed
        with locked(folder, wait) as mine:
            if not mine:
                log.info("%s: another process runs it; left for the end", os.path.relpath(folder))
                ledger.postponed.add(folder)
                return None
            answer = pipeline.answer(cfg, folder)
            if answer is not None:
                metrics = answer.metrics
            else:
                if sweep is not None:
                    sweep.enter(entry := ledger.started(entry, sweep, folder))
                metrics = _run(cfg, folder, sweep)
            (folder / FAILURE).unlink(missing_ok=True)
            if sweep is not None:
                _finish(sweep, entry, folder, answer, time.perf_counter() - start)
    except NotStarted as error:
        error.add_note(REPORTED)
        raise
    except Exception as error:
        reason = message_for(error)
        log.error("failed: %s", reason, exc_info=needs_traceback(error))
        with contextlib.suppress(OSError, UserError):  # the disk may be what is full
            if sweep is not None:
                begun = ledger.started(entry, sweep, folder)
                seconds = time.perf_counter() - start
                sweep.enter(replace(begun, status="failed", reason=reason, seconds=seconds))
            results.write_json(folder / FAILURE, {"reason": reason, "overrides": overrides})
        if sweep is None:
            raise SystemExit(1) from error  # reported already
        error.add_note(REPORTED)
        raise
    log.info("%s: %s", os.path.relpath(folder), headline(metrics))
    return optimized(cfg.optimize, metrics)


def _join(cfg: DictConfig, folder: Path) -> None:
    """The job of a process other than the first."""
    from qexp.sweeps import worker

    try:
        worker.join(cfg, folder)
    except Exception as error:
        log.error(
            "process %d: %s", ranks.rank() + 1, message_for(error), exc_info=needs_traceback(error)
        )
        with locked(
            folder, 30.0
        ):  # torchrun kills all ranks when one exits: wait until rank 0 has reported its error
            raise SystemExit(1) from error


class NotStarted(UserError):
    """A job that the settings of the sweep do not start."""


def _admit(sweep: Sweep, entry: Entry, fail_fast: bool) -> None:
    """Raises NotStarted for a job that failed before, and after any failure with `fail_fast`."""
    if entry.status == "failed":
        log.error("%s: %s", " ".join(entry.overrides), entry.reason)
        raise NotStarted(f"it failed before: {entry.reason}; retry=failed tries again")
    if fail_fast and any(other.status == "failed" for other in sweep.entries()):
        raise NotStarted("a job of this sweep failed, and fail_fast is set")


def _finish(
    sweep: Sweep, entry: Entry, folder: Path, answer: results.Answer | None, seconds: float
) -> None:
    """Enter the result. A job answered from disk keeps the entry of the launch that ran it."""
    if answer is not None and entry.status == "done":
        return
    done = replace(entry, status="done")
    try:
        if answer is not None:
            kept = replace(done, folder=str(answer.place), cost=answer.cost, launch="")
            sweep.enter(replace(kept, seconds=answer.cost["seconds"]))
        else:
            ran = replace(done, folder=str(folder), cost=results.cost(folder))
            sweep.enter(replace(ran, seconds=seconds, launch=sweep.launch))
    except UserError as error:  # the run itself is complete
        log.warning("%s", error)


def _serial(settings: Any) -> bool:
    """Whether jobs run one after another and all of them are known."""
    launcher, sweeper = settings.launcher._target_, settings.sweeper._target_
    return launcher.endswith("BasicLauncher") and sweeper.endswith("BasicSweeper")


def _run(cfg: DictConfig, folder: Path, sweep: Sweep | None) -> dict[str, float]:
    """Run, with the loggers that the configuration names."""
    from qexp import pipeline
    from qexp.report import loggers

    settings: Any = HydraConfig.instance().cfg
    if cfg.threads is None and sweep is not None:
        cfg.threads = gpu_pool.threads(settings.hydra.launcher)
    results.write_config(folder, cfg, settings)
    group = sweep.name if sweep is not None else None
    with loggers.opened(cfg, folder, group) as opened:
        return pipeline.run(cfg, folder, opened)


def headline(metrics: dict[str, float]) -> str:
    """Perplexities and accuracies with their standard errors, and the measured bits."""
    parts = []
    for name, value in metrics.items():
        if name.endswith(("/ppl", "/acc")) and name.count("/") == 1:
            digits = 2 if name.endswith("/ppl") else 4
            error = metrics.get(f"{name}_stderr", math.nan)  # a single window has none
            spread = "" if math.isnan(error) else f" (se {error:.{digits}f})"
            parts.append(f"{name} {value:.{digits}f}{spread}")
        elif name == "weight/bits":
            parts.append(f"{name} {value:.2f}")
    return ", ".join(parts) or f"{len(metrics)} metrics"


def optimized(wanted: str | Sequence[str] | None, metrics: dict[str, float]) -> Objective:
    """The metric of this name, else the first whose name ends with it; a tuple for a list.

    `ppl`, which also stands for None, is None where there is none, as for a classifier.
    """
    wanted = wanted or "ppl"
    if not isinstance(wanted, str):
        values = [optimized(name, metrics) for name in wanted]
        return tuple(value for value in values if not isinstance(value, tuple))
    if wanted in metrics:
        return metrics[wanted]
    for name, value in metrics.items():
        if name.endswith(f"/{wanted}"):
            return value
    if wanted == "ppl":
        return None
    raise UserError(f"optimize={wanted}: no such metric; {messages.nearest(wanted, list(metrics))}")
