"""Which code made a number."""

import functools
import hashlib
import os
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


@functools.cache
def code() -> str:
    """Sixteen hex digits over the names and contents of the package's sources.

    Read once a process: a sweep that is running does not see an edit, and neither does its
    imported code.
    """
    return of(PACKAGE)


def of(folder: Path) -> str:
    """The fingerprint of the `*.py` files under a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def sha256(path: Path) -> str:
    """Of a file's content; read once per process while size and time stay the same."""
    status = path.stat()
    return _sha256(os.fspath(path), status.st_size, status.st_mtime_ns)


@cache
def _sha256(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
