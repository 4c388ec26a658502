"""The command `qexp`: one run, or a sweep with -m."""

import contextlib
import errno
import logging
import os
import sys
import traceback
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from qexp import composition, ledger, resolvers, results
from qexp.errors import UserError
from qexp.provenance import stamp

log = logging.getLogger(__name__)

FAILURE = "failure.json"
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
TRACE = "QEXP_TRACE"  # tells the workers of a launcher what HYDRA_FULL_ERROR was

resolvers.register()  # on import: a launcher's worker names the folder before it calls the job


def conf() -> Path:
    """The folder of the configurations: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def main() -> None:
    """Run the Hydra application; faults of the user's are one sentence, all others a traceback."""
    asked = os.environ.get("HYDRA_FULL_ERROR")
    os.environ[TRACE] = "1" if asked == "1" else "0"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hand exceptions on instead of printing them
    os.environ.pop(ledger.VARIABLE, None)
    logging.raiseExceptions = False  # a log that a full disk refuses is not what went wrong
    code: str | int | None = 0
    try:
        hydra.main(version_base="1.3", config_path=str(conf()), config_name="config")(job)()
    except KeyboardInterrupt:
        _say("interrupted; finished runs are kept, the one under way left no result")
        code = 130
    except SystemExit as stop:
        code = stop.code
    except Exception as error:
        code = 1
        if not _reported(error):
            if _traced(error):
                traceback.print_exception(error)
            _say(_sentence(error))
    finally:
        if asked is None:
            os.environ.pop("HYDRA_FULL_ERROR")
    if (sweep := ledger.current()) is not None and (jobs := ledger.entries(sweep)):
        _say(ledger.summary(jobs))
    sys.exit(code)


def job(cfg: DictConfig) -> float | None:
    """One run; its value is the metric that a sweeper minimizes.

    A failure is told and written to `failure.json` as it happens, then raised, so that Hydra
    counts the job as failed and goes on with the next.
    """
    settings = HydraConfig.get()
    folder = Path(settings.runtime.output_dir)
    sweep = ledger.current() if settings.mode == RunMode.MULTIRUN else None
    overrides = list(settings.overrides.task)
    try:
        metrics, answered = _run(cfg, folder, sweep)
    except Exception as error:
        reason = _sentence(error)
        log.error("failed: %s", reason, exc_info=_traced(error))
        with contextlib.suppress(OSError, UserError):  # the disk may be what is full
            results.write_json(folder / FAILURE, {"reason": reason, "overrides": overrides})
            if sweep is not None:
                ledger.enter(sweep, ledger.Entry("failed", str(folder), overrides, reason))
        if sweep is None:
            raise SystemExit(1) from error  # told already
        error.add_note(_REPORTED)
        raise
    (folder / FAILURE).unlink(missing_ok=True)
    log.info("%s: %s", os.path.relpath(folder), headline(metrics))
    if sweep is not None:
        entry = ledger.Entry("answered" if answered else "ran", str(folder), overrides)
        ledger.enter(sweep, entry)
    return optimized(cfg.optimize, metrics)


def headline(metrics: dict[str, float]) -> str:
    """The perplexities with their standard errors, and the measured bits."""
    parts = []
    for name, value in metrics.items():
        if name.endswith("/ppl"):
            error = metrics.get(f"{name}_stderr")
            parts.append(f"{name} {value:.2f}" + (f" ± {error:.2f}" if error is not None else ""))
        elif name == "weight/bits":
            parts.append(f"{name} {value:.2f}")
    return ", ".join(parts) or f"{len(metrics)} metrics"


def optimized(name: str | None, metrics: dict[str, float]) -> float | None:
    """The metric of that name; without a name the first perplexity, or None when there is none."""
    if name is None:
        return next((value for key, value in metrics.items() if key.endswith("/ppl")), None)
    if name not in metrics:
        raise UserError(
            f"optimize={name}: no such metric; {composition.nearest(name, list(metrics))}"
        )
    return metrics[name]


def _run(cfg: DictConfig, folder: Path, sweep: Path | None) -> tuple[dict[str, float], bool]:
    """The metrics, and whether they were on disk already."""
    from qexp import loggers, pipeline

    before = stamp(folder / results.METRICS)
    with contextlib.ExitStack() as stack:
        group = sweep.stem if sweep is not None else None
        show = None
        if results.stale(folder) is not None:  # a run that is answered is not logged again
            show = stack.enter_context(loggers.opened(cfg, folder, group))
        metrics = pipeline.run(cfg, folder)
        if show is not None:
            show(metrics)
    return metrics, before is not None and stamp(folder / results.METRICS) == before


_REPORTED = "told when it happened"


def _reported(error: BaseException) -> bool:
    return _REPORTED in getattr(error, "__notes__", ())


def _traced(error: BaseException) -> bool:
    """Whether to show where it happened: always for a fault of the program."""
    expected = isinstance(error, UserError | HydraException | OmegaConfBaseException)
    disk = isinstance(error, OSError) and error.errno in DISK  # Hydra's own files, W&B's, caches
    return not (expected or disk) or os.environ.get(TRACE) == "1"


def _sentence(error: Exception) -> str:
    if isinstance(error, HydraException | OmegaConfBaseException):
        return composition.sentence(error)
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in DISK:
        where = error.filename or "the run's folder or a cache"
        return f"{where}: {error.strerror}; free space or choose another folder"
    return f"{type(error).__name__}: {error}"


def _say(text: str) -> None:
    print(f"qexp: {text}", file=sys.stderr)
