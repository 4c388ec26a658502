"""Error reporting: one sentence for the user, and the exit code of a command."""

import errno
import os
import select
import sys
import traceback
from collections.abc import Callable

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from qexp.common.errors import UserError
from qexp.config import messages

DISK = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EFBIG),
    *(errno.EEXIST, errno.ENOTDIR),  # a file where a folder was to be made
)
TRACE = "QEXP_TRACE"  # tells the workers of a launcher what HYDRA_FULL_ERROR was
REPORTED = "reported when it happened"
UNREAD = 128 + 13  # as of a command that SIGPIPE ended


def run_reporting_errors(work: Callable[[], object]) -> int:
    """The exit code of `work`: what it returns where that is a number, else 0; 1 after an error.

    An error is reported on stderr: one sentence, after a traceback where it is not the user's. When
    nobody reads the output any more (`qexp ls | head`), nothing is reported.
    """
    code = _reported(work)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return _muted()
    return code


def _reported(work: Callable[[], object]) -> int:
    try:
        code = work()
    except KeyboardInterrupt:
        say("interrupted; finished runs are kept, the one under way left no result")
        return 130
    except SystemExit as stop:
        if isinstance(stop.code, str):
            say(stop.code)
            return 1
        return stop.code or 0
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            return _muted()
        if not already_reported(error):
            if needs_traceback(error):
                traceback.print_exception(error)
            say(message_for(error))
        return 1
    return code if isinstance(code, int) else 0


def _reader_left() -> bool:
    """Whether nothing reads stdout any more: another pipe, to a worker, may have broken too."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)  # errors alone
    return bool(output.poll(0))


def _muted() -> int:
    """The exit code; what is still to be written goes nowhere, or it would be tried at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return UNREAD


def say(text: str) -> None:
    """A line for the user, on stderr."""
    print(f"qexp: {text}", file=sys.stderr)


def already_reported(error: BaseException) -> bool:
    return REPORTED in getattr(error, "__notes__", ())


def needs_traceback(error: BaseException) -> bool:
    """Whether to show the traceback: always for an error of the program."""
    expected = isinstance(error, UserError | HydraException | OmegaConfBaseException)
    disk = isinstance(error, OSError) and error.errno in DISK  # Hydra's own files, W&B's, caches
    missing = messages.missing_plugin(error) is not None
    return not (expected or disk or missing) or os.environ.get(TRACE) == "1"


def message_for(error: Exception) -> str:
    """One sentence for the user."""
    if isinstance(error, HydraException | OmegaConfBaseException):
        return messages.message_for(error)
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in DISK:
        where = error.filename or "the run's folder or a cache"
        return f"{where}: {error.strerror}; free space or choose another folder"
    return messages.missing_plugin(error) or f"{type(error).__name__}: {error}"
