"""The Hydra application called from Python: overrides in, exceptions out."""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from qexp.common.errors import UserError
from qexp.config import messages
from qexp.config.location import conf
from qexp.runs import signature
from qexp.sweeps import app
from qexp.sweeps.app import Work
from qexp.sweeps.failures import already_reported

OUTPUTS = Path("outputs")


def composed(words: Sequence[str]) -> tuple[DictConfig, Path]:
    """A job's configuration and its folder. Raises UserError for a wrong override."""
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(conf())):
            cfg = compose("config", list(words))
            return cfg, OUTPUTS / signature.signature(cfg)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(messages.message_for(error)) from error


def command(words: Sequence[str]) -> int:
    """`qexp WORDS` in this process, so that modules are imported once; the exit code. Errors are
    reported on stderr as the command does. Raises KeyboardInterrupt for an interrupted one."""
    with _arguments(words):
        try:
            app.main()
        except SystemExit as stop:
            if stop.code == 130:
                raise KeyboardInterrupt from stop
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def call(words: Sequence[str], work: Work | None = None) -> None:
    """`qexp WORDS` in this process, with `work` for each job (by default that of the command).

    Raises what a run raises: UserError for a mistake of the user. A sweep raises nothing for jobs
    that failed: its record holds the reasons. Logging is afterwards as it was.
    """
    with _arguments(words), _logging():
        app.launch(work, _raising)


def _raising(work: Callable[[], object]) -> int:
    try:
        work()
    except SystemExit as stop:  # a job or a callback of Hydra that turned an error into an exit
        if isinstance(stop.__cause__, Exception):
            raise _of_user(stop.__cause__) from stop.__cause__.__cause__
        if isinstance(stop.code, str):
            raise UserError(stop.code) from None
    except Exception as error:
        if not already_reported(error):
            raise _of_user(error) from error.__cause__
    return 0


def _of_user(error: Exception) -> Exception:
    """The error itself, or the UserError of an error in composing a configuration."""
    if isinstance(error, HydraException | OmegaConfBaseException):
        return UserError(messages.message_for(error))
    missing = messages.missing_plugin(error)
    return error if missing is None else UserError(missing)


@contextlib.contextmanager
def _arguments(words: Sequence[str]) -> Iterator[None]:
    """Hydra reads its arguments from this process."""
    before = sys.argv
    sys.argv = ["qexp", *words]
    try:
        yield
    finally:
        sys.argv = before


@contextlib.contextmanager
def _logging() -> Iterator[None]:
    """Hydra replaces the handlers of the root logger."""
    root, raises = logging.getLogger(), logging.raiseExceptions
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        for handler in root.handlers:
            if handler not in handlers:
                with contextlib.suppress(ValueError):
                    handler.close()
        root.handlers[:], logging.raiseExceptions = handlers, raises
        root.setLevel(level)
