"""The command `qexp`: one run, or a sweep with -m; and what is no run (`qexp cache`)."""

import logging
import os
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import hydra
from omegaconf import DictConfig

from qexp import ledger
from qexp.job import TRACE, Objective, job, sentence, told, traced

# module whose `main` takes the rest of the line
COMMANDS = {"cache": "qexp.entries", "diff": "qexp.difference", "wandb-sweep": "qexp.search"}


def conf() -> Path:
    """The folder of the configurations: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def main(work: Callable[[DictConfig], Objective] | None = None) -> None:
    """Run the Hydra application, `job` or what is done around it; faults of the user's are one
    sentence, all others a traceback."""
    asked = os.environ.get("HYDRA_FULL_ERROR")
    os.environ[TRACE] = "1" if asked == "1" else "0"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hand exceptions on instead of printing them
    os.environ[ledger.VARIABLE] = ""
    ledger.postponed.clear()
    logging.raiseExceptions = False  # a log that a full disk refuses is not what went wrong
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in COMMANDS:
        sys.exit(guarded(lambda: import_module(COMMANDS[name]).main(sys.argv[2:])))
    sys.argv = ["dry_run=true" if word == "--dry-run" else word for word in sys.argv]
    app = hydra.main(version_base="1.3", config_path=str(conf()), config_name="config")
    try:
        code = guarded(app(work or job))
        if ledger.postponed and code in (0, 1):
            code = max(code, guarded(app(work or job)))
    finally:
        if asked is None:
            os.environ.pop("HYDRA_FULL_ERROR")
    if (sweep := ledger.current()) is not None and sweep.entries():
        _say(ledger.summary(sweep))
    sys.exit(code)


def guarded(work: Callable[[], object]) -> int:
    """The exit code of what is done; what went wrong is told on stderr."""
    try:
        work()
    except KeyboardInterrupt:
        _say("interrupted; finished runs are kept, the one under way left no result")
        return 130
    except SystemExit as stop:
        if isinstance(stop.code, str):
            _say(stop.code)
            return 1
        return stop.code or 0
    except Exception as error:
        if not told(error):
            if traced(error):
                traceback.print_exception(error)
            _say(sentence(error))
        return 1
    return 0


def _say(text: str) -> None:
    print(f"qexp: {text}", file=sys.stderr)
