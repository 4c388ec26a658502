"""Hashes of the package's source code and of files."""

import functools
import hashlib
import os
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


@functools.cache
def code() -> str:
    """Sixteen hex digits: the hash of the names and contents of the package's sources.

    Computed once per process: a running sweep keeps the code that it imported, so an edit must not
    change its hash.
    """
    return of(PACKAGE)


def of(folder: Path) -> str:
    """Sixteen hex digits: the hash of the `*.py` files below a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def sha256(path: Path) -> str:
    """The sha256 of a file; computed once per process while its size and time do not change."""
    status = path.stat()
    return _sha256(os.fspath(path), status.st_size, status.st_mtime_ns)


@cache
def _sha256(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
