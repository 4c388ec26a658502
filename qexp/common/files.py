"""Files that are whole or absent, and where data files are."""

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
    """The folder of data that came with no package: `chosen`, else what QEXP_DATA_DIR names."""
    named = chosen or os.environ.get("QEXP_DATA_DIR")
    return Path(named).expanduser() if named else None


def locate(path: str) -> Path:
    """A file or folder by its own name or, where that is relative and nothing here has it, by its
    name below the data folder. So a configuration need not say where that folder is."""
    own, data = Path(path).expanduser(), data_folder()
    return own if own.exists() or data is None else data / own


@contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name beside `path` that becomes `path` when the block ends well.

    On any exception, an interrupt included, the temporary file goes and what stood at `path`
    stays. A full disk, a folder without permission and the like become a UserError with the path.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # the suffix stays last: savers such as numpy and matplotlib choose the format by it
        handle, name = tempfile.mkstemp(
            prefix=f".{path.stem}.", suffix=f".tmp{path.suffix}", dir=path.parent
        )
        os.close(handle)
    except OSError as error:
        raise _refused(path, error.strerror) from error
    temporary = Path(name)
    try:
        yield temporary
        # results are shared; mkstemp, and savers that replace the file, make it private
        temporary.chmod(0o666 & ~_umask())
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename not in (None, name, str(path)):
            raise  # about another file, one that was being read
        raise _refused(path, error.strerror) from error
    except Exception as error:
        # savers written in other languages (safetensors) keep only the words of an OSError
        if (number := re.search(r"os error (\d+)", str(error))) is not None:
            raise _refused(path, os.strerror(int(number[1]))) from error
        if "No space left" in str(error):
            raise _refused(path, "No space left on device") from error
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
    """A CSV file with a column for every key of any row, in the order of their first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, restval="")
        table.writeheader()
        table.writerows(rows)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path`, absent or empty until then, when the
    block ends well."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise _refused(path, error.strerror) from error
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())  # mkdtemp made it private
        os.replace(temporary, path)
    except OSError as error:
        raise _refused(path, error.strerror) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def locked(folder: Path, wait: bool | float = True) -> Iterator[bool]:
    """Hold a folder against other processes. False, without it, if another has it and `wait` is not
    set, or longer than `wait` seconds. However a process ends, what it held is free; what it left
    half-written goes here."""
    from filelock import FileLock, Timeout  # a tenth of a second that --help need not wait

    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(-1.0 if wait is True else float(wait), poll_interval=0.2)
    except Timeout:
        yield False
        return
    except OSError as error:
        raise _refused(folder, error.strerror) from error
    try:
        for left in folder.glob(".*.tmp*"):
            left.unlink(missing_ok=True)
        yield True
    finally:
        lock.release()


def _refused(path: Path, reason: str | None) -> UserError:
    return UserError(
        f"{path}: cannot be written ({reason or 'unknown reason'}); "
        "free space or choose another folder"
    )


def _umask() -> int:
    """The process's file mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
