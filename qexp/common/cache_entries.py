"""Listing and pruning of cache entries: `qexp cache [--prune]`."""

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
INPUTS = "models"  # runs record these files as inputs: a new download makes them stale
PERIODS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def default_folder() -> Path:
    """The folder QEXP_CACHE_DIR, else `qexp` in the user's cache folder (XDG)."""
    if chosen := os.environ.get("QEXP_CACHE_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qexp"


@dataclass(frozen=True)
class Stored:
    """One entry: a file, or a folder (converted models).

    Hidden entries are incomplete: a killed process left them.
    """

    path: Path
    kind: str
    bytes: int
    idle: float  # seconds since the last use


def stored(folder: Path | None = None) -> list[Stored]:
    """Every entry, the most recently used last."""
    now, entries = time.time(), []
    for path in (folder or default_folder()).glob("*/*"):
        if path.suffix == LOCK:
            continue
        with contextlib.suppress(OSError):  # removed meanwhile
            parts = [each.stat() for each in ([path] if path.is_file() else path.rglob("*"))]
            used = max((max(part.st_mtime, part.st_atime) for part in parts), default=0.0)
            size = sum(part.st_size for part in parts)
            entries.append(Stored(path, path.parent.name, size, max(now - used, 0.0)))
    return sorted(entries, key=lambda entry: -entry.idle)


def prune(
    folder: Path, kinds: Sequence[str] = (), older: float = 0.0, size: float | None = None
) -> list[Stored]:
    """Remove entries that were idle for at least `older` seconds, longest idle first.

    kinds: which to remove; none given: all but INPUTS. size: stop once the rest takes at most this
    many bytes. Returns the removed entries. Raises UserError for one that cannot be removed.

    Safe while jobs run: an entry that is being written is locked and stays, and an open file stays
    readable for the process that has it open.
    """
    from filelock import FileLock, Timeout

    every = stored(folder)
    total, removed = sum(entry.bytes for entry in every), []
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
                path.unlink(missing_ok=True)  # under the lock; a waiting process creates a new one
        except Timeout:
            continue
        except OSError as error:
            raise UserError(f"{entry.path}: cannot be removed ({error.strerror})") from error
        total -= entry.bytes
        removed.append(entry)
    return removed


def _remove(path: Path) -> None:
    """A folder is renamed first, so that it is complete or absent at any time."""
    if path.is_file():
        path.unlink(missing_ok=True)
        return
    hidden = path.with_name(f".{path.name}.{os.getpid()}")
    path.rename(hidden)
    shutil.rmtree(hidden)


def table(every: Sequence[Stored]) -> str:
    """One line per kind: entries, size, shortest and longest idle time."""
    lines = [f"{'kind':<14}{'entries':>9}{'size':>12}{'idle':>18}"]
    for kind in sorted({entry.kind for entry in every}):
        entries = [entry for entry in every if entry.kind == kind]
        idle = f"{_period(entries[-1].idle)} to {_period(entries[0].idle)}"
        size = _size(sum(entry.bytes for entry in entries))
        lines.append(f"{kind:<14}{len(entries):>9}{size:>12}{idle:>18}")
    return "\n".join(lines)


def summary() -> str:
    """Number of entries, size and folder of the cache, in one line."""
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
