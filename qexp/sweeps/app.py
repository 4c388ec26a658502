"""The Hydra application: one run, or a sweep with -m."""

import logging
import os
import sys
from collections.abc import Callable, Sequence

import hydra
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig

from qexp.config.chains import as_choices
from qexp.config.location import conf
from qexp.sweeps import ledger
from qexp.sweeps.failures import TRACE, run_reporting_errors, say
from qexp.sweeps.job import Objective, job

Work = Callable[[DictConfig], Objective]
Guard = Callable[[Callable[[], object]], int]


def main(work: Work | None = None) -> None:
    """Run the Hydra application with `work` (by default `job`) and exit.

    A mistake of the user is one sentence, every other error a traceback.
    """
    sys.exit(launch(work))


def launch(work: Work | None = None, guard: Guard = run_reporting_errors) -> int:
    """Run the application with the arguments of this process; the exit code. `guard` runs it and
    decides what becomes of an exception."""
    asked = os.environ.get("HYDRA_FULL_ERROR")
    os.environ[TRACE] = "1" if asked == "1" else "0"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise exceptions instead of printing them
    os.environ[ledger.VARIABLE] = ""
    ledger.postponed.clear()
    logging.raiseExceptions = False  # a log that cannot be written is not the error
    words = ["dry_run=true" if word == "--dry-run" else word for word in sys.argv[1:]]
    sys.argv = [sys.argv[0], *as_choices(overrides_last(words))]
    app = hydra.main(version_base="1.3", config_path=str(conf()), config_name="config")
    try:
        code = guard(app(work or job))
        if ledger.postponed and code in (0, 1):
            code = max(code, guard(app(work or job)))
    finally:
        if asked is None:
            os.environ.pop("HYDRA_FULL_ERROR")
    if (sweep := ledger.current()) is not None and sweep.entries():
        say(ledger.summary(sweep))
    return code


def overrides_last(words: Sequence[str]) -> list[str]:
    """The words in an order that Hydra's parser takes: it wants all overrides in one piece, and
    `qexp method=rtn -m seed=0,1` has two."""
    overrides = get_args_parser().parse_known_intermixed_args(words)[0].overrides
    flags = list(words)
    for override in overrides:
        flags.remove(override)
    return [*flags, *overrides]
