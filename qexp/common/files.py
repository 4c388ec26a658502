"""Atomic writes of files and folders, folder locks, and the data folder."""

import csv
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from qexp.common.errors import UserError

LOCK = ".lock"


def data_folder(chosen: str | None = None) -> Path | None:
    """The folder of the user's data files: `chosen`, else QEXP_DATA_DIR, else None."""
    name = chosen or os.environ.get("QEXP_DATA_DIR")
    return Path(name).expanduser() if name else None


def locate(path: str) -> Path:
    """`path` itself or, where it is relative and does not exist, `path` below the data folder.

    Configurations that hold relative paths work with any data folder.
    """
    given, data = Path(path).expanduser(), data_folder()
    return given if given.exists() or data is None else data / given


@contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file in the folder of `path` that replaces `path` when the block succeeds.

    On any exception, including an interrupt, the temporary file is removed and `path` is unchanged.
    Raises UserError with the path when the disk is full, the folder is not writable and the like.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # the suffix comes last: savers such as numpy and matplotlib choose the format by it
        handle, name = tempfile.mkstemp(
            prefix=f".{path.stem}.", suffix=f".tmp{path.suffix}", dir=path.parent
        )
        os.close(handle)
    except OSError as error:
        raise _not_writable(path, error.strerror) from error
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp, and savers that replace the file, make it private; results are shared
        temporary.chmod(0o666 & ~_umask())
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except Exception as error:
        if (reason := _failed_write(error, (temporary, path))) is not None:
            raise _not_writable(path, reason) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def made(folder: Path, key: str) -> None:
    """Make a folder, where it is not there. UserError with the `key` that names it, where it cannot
    be made or no file can be made in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{key}={folder}: no files can be written there ({error.strerror}); choose another "
            "folder"
        ) from error


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write a CSV file with one column per key of any row, in order of first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, restval="")
        table.writeheader()
        table.writerows(rows)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder next to `path` that becomes `path` when the block succeeds.

    `path` must be absent or empty. Raises UserError when it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise _not_writable(path, error.strerror) from error
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())  # mkdtemp made it private
        os.replace(temporary, path)
    except Exception as error:
        if (reason := _failed_write(error, (temporary, path))) is not None:
            raise _not_writable(path, reason) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def locked(folder: Path, wait: bool | float = True) -> Iterator[bool]:
    """Lock a folder against other processes; the lock is released however the process ends.

    Yields False, without the lock, if another process holds it: immediately for wait=False, else
    after `wait` seconds. Temporary files that a killed process left are removed.
    """
    from filelock import FileLock, Timeout  # 0.1 s to import, which --help does not need

    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(-1.0 if wait is True else float(wait), poll_interval=0.2)
    except Timeout:
        yield False
        return
    except OSError as error:
        raise _not_writable(folder, error.strerror) from error
    try:
        for leftover in folder.rglob(".*.tmp*"):
            leftover.unlink(missing_ok=True)
        yield True
    finally:
        lock.release()


def _failed_write(error: Exception, places: Sequence[Path]) -> str | None:
    """The reason of an exception that writing to one of these files or folders raised; None for any
    other, for instance about another file that was being read."""
    if isinstance(error, OSError):
        named = error.filename
        own = named is None or any(Path(named).is_relative_to(place) for place in places)
        return (error.strerror or "unknown reason") if own else None
    # savers written in other languages (safetensors) keep only the message of an OSError
    if (number := re.search(r"os error (\d+)", str(error))) is not None:
        return os.strerror(int(number[1]))
    return "No space left on device" if "No space left" in str(error) else None


def _not_writable(path: Path, reason: str | None) -> UserError:
    return UserError(
        f"{path}: cannot be written ({reason or 'unknown reason'}); "
        "free space or choose another folder"
    )


def _umask() -> int:
    """The file mask of this process; reading it requires setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
