"""Which code made a number."""

import functools
import hashlib
from pathlib import Path

PACKAGE = Path(__file__).parent


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
