"""What the cache holds, and getting rid of it: `qexp cache [--prune]`."""

import contextlib
import math
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qexp.common.errors import UserError

LOCK = ".lock"
INPUTS = "models"  # fetched files, which runs name: fetched again they are others
PERIODS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def default_folder() -> Path:
    """QEXP_CACHE_DIR, or `qexp` in the user's cache folder (XDG)."""
    if chosen := os.environ.get("QEXP_CACHE_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qexp"


@dataclass(frozen=True)
class Stored:
    """One entry: a file, or a folder (converted models). Hidden ones are what a killed process
    left half-written."""

    path: Path
    kind: str
    bytes: int
    idle: float  # seconds since it was last used


def stored(folder: Path | None = None) -> list[Stored]:
    """Every entry, the one used last at the end."""
    now, found = time.time(), []
    for path in (folder or default_folder()).glob("*/*"):
        if path.suffix == LOCK:
            continue
        with contextlib.suppress(OSError):  # it went just now
            parts = [each.stat() for each in ([path] if path.is_file() else path.rglob("*"))]
            used = max((max(part.st_mtime, part.st_atime) for part in parts), default=0.0)
            size = sum(part.st_size for part in parts)
            found.append(Stored(path, path.parent.name, size, max(now - used, 0.0)))
    return sorted(found, key=lambda entry: -entry.idle)


def prune(
    folder: Path, kinds: Sequence[str] = (), older: float = 0.0, size: float | None = None
) -> list[Stored]:
    """Remove entries of some kinds (none named: all but INPUTS) that were idle for `older` seconds,
    the longest first; with `size` only until the rest takes no more bytes. Returned is what went.

    Safe beside running jobs: an entry that is being made is locked and stays, and one that is open
    stays readable for who has it open.
    """
    from filelock import FileLock, Timeout

    every = stored(folder)
    total, gone = sum(entry.bytes for entry in every), []
    for entry in every:
        wanted = entry.kind in kinds if kinds else entry.kind != INPUTS
        if not wanted or entry.idle < older:
            continue
        if size is not None and total <= size:
            break
        path = entry.path.with_suffix(LOCK)
        try:
            with FileLock(path, blocking=False):
                _remove(entry.path)
                path.unlink(missing_ok=True)  # under the lock: who waits for it makes a new one
        except Timeout:
            continue
        except OSError as error:
            raise UserError(f"{entry.path}: cannot be removed ({error.strerror})") from error
        total -= entry.bytes
        gone.append(entry)
    return gone


def _remove(path: Path) -> None:
    """A folder goes under another name first: it is whole or absent."""
    if path.is_file():
        path.unlink(missing_ok=True)
        return
    hidden = path.with_name(f".{path.name}.{os.getpid()}")
    path.rename(hidden)
    shutil.rmtree(hidden)


def table(every: Sequence[Stored]) -> str:
    """A line per kind: entries, size, and how long the oldest and the newest were idle."""
    lines = [f"{'kind':<14}{'entries':>9}{'size':>12}{'idle':>18}"]
    for kind in sorted({entry.kind for entry in every}):
        own = [entry for entry in every if entry.kind == kind]
        idle = f"{_period(own[-1].idle)} to {_period(own[0].idle)}"
        lines.append(f"{kind:<14}{len(own):>9}{_size(sum(e.bytes for e in own)):>12}{idle:>18}")
    return "\n".join(lines)


def summary() -> str:
    """The whole cache in one line."""
    every = stored()
    size = _size(sum(entry.bytes for entry in every))
    return f"cache: {len(every)} entries, {size}, in {default_folder()}"


def _size(size: float | int) -> str:
    power = min(max(int(math.log2(max(size, 1)) // 10), 0), 4)
    return f"{size / 2 ** (10 * power):.{min(power, 1)}f} {' KMGT'[power].strip()}B"


def _period(seconds: float | int) -> str:
    for unit, length in reversed(PERIODS.items()):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return "0 s"
