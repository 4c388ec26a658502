"""Cache of computed tensors that runs share; a key holds everything its entry depends on."""

import contextlib
import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, uint8

from qexp.common import collectives, ranks
from qexp.common.cache_entries import LOCK, default_folder
from qexp.common.errors import UserError
from qexp.common.files import atomic

log = logging.getLogger(__name__)

Build = Callable[[], dict[str, Tensor]]

_warned: set[Path] = set()  # folders whose failed write has been reported


@dataclass(frozen=True)
class Cache:
    """One safetensors file per entry, which also holds the full key and a checksum.

    An entry that is corrupt, truncated or made for another key is rebuilt. A folder that cannot be
    read or written costs one warning per process and never stops a run. Runs that need the same
    entry at the same time wait for the first.

    The processes of one run call these methods together: the first reads and writes, and gives the
    others what it read. So all of them compute an entry that is absent, or none does. together:
    false where one process may need an entry that the others do not (`get` alone).
    """

    folder: Path = field(default_factory=default_folder)
    together: bool = True

    def get(self, kind: str, key: Mapping[str, Any], build: Build) -> dict[str, Tensor]:
        """The entry of `key`, computed by `build` if absent. Exceptions of `build` propagate.

        `key` must be JSON. The hash of the module that defines `build` is added to it, so that
        changed code never reads old entries. Tensors are returned on the CPU, contiguous.
        """
        path, full_key = self._place(kind, {**key, "code": _source(build.__module__)})
        writes = not (self.together and ranks.rank())
        with ExitStack() as stack:

            def look() -> dict[str, Tensor] | None:
                found = _read(path, full_key)
                if found is None and writes:  # rank 0 may hold it and wait for this rank
                    stack.enter_context(_exclusive(path))
                    # another process may have written it while this one waited
                    found = _read(path, full_key, quiet=True)
                return found

            tensors = collectives.from_first(look) if self.together else look()
            if tensors is not None:
                return tensors
            built = plain(build())
            if writes:
                _write(path, full_key, built)
            return built

    def alone(self, kind: str, key: Mapping[str, Any]) -> AbstractContextManager[None]:
        """An exclusive lock on an entry against other runs, to hold from `find` to `put`."""
        return nullcontext() if ranks.rank() else _exclusive(self._place(kind, key)[0])

    def find(self, kind: str, key: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """The entry of `key`, or None. The key must include the hashes of its code (`sources`)."""
        return collectives.from_first(lambda: _read(*self._place(kind, key)))

    def put(self, kind: str, key: Mapping[str, Any], tensors: dict[str, Tensor]) -> bool:
        """Write an entry. Returns False, with a warning, where it cannot be written."""
        path, full_key = self._place(kind, key)
        return collectives.from_first(lambda: _write(path, full_key, plain(tensors)))

    def drop(self, kind: str, key: Mapping[str, Any]) -> None:
        """Delete an entry if it exists."""
        if ranks.rank():
            return
        with contextlib.suppress(OSError):
            self._place(kind, key)[0].unlink(missing_ok=True)

    def _place(self, kind: str, key: Mapping[str, Any]) -> tuple[Path, str]:
        full_key = json.dumps({**key, "kind": kind}, sort_keys=True)
        return self.folder / kind / f"{_sha256(full_key.encode())[:32]}.safetensors", full_key


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    lock = FileLock(path.with_suffix(LOCK))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        _warn_once(path.parent.parent, error)
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _warn_once(folder: Path, error: Exception) -> None:
    """Warns once per process, not once per entry."""
    if folder not in _warned:
        _warned.add(folder)
        log.warning("cache %s cannot be written (%s); continuing without it", folder, error)


def plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors detached, on the CPU and contiguous."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _read(path: Path, full_key: str, quiet: bool = False) -> dict[str, Tensor] | None:
    """The entry, or None if it is absent, damaged or made for another key."""
    try:
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        with contextlib.suppress(OSError):  # a read-only cache
            os.utime(path)  # entries in use are pruned last
    except FileNotFoundError:  # pruned meanwhile
        return None
    except (OSError, SafetensorError) as error:
        reason = str(error)
    else:
        if metadata.get("key") != full_key:
            reason = "made for another key"
        elif metadata.get("checksum") != checksum(tensors):
            reason = "checksum differs"
        else:
            return tensors
    if not quiet:
        log.warning("cache entry %s cannot be used (%s); rebuilding it", path, reason)
    return None


def _write(path: Path, full_key: str, tensors: dict[str, Tensor]) -> bool:
    try:
        with atomic(path) as temporary:
            save_file(tensors, temporary, {"key": full_key, "checksum": checksum(tensors)})
    except (OSError, SafetensorError, UserError) as error:
        _warn_once(path.parent.parent, error)
        return False
    return True


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(uint8).numpy().data)
    return digest.hexdigest()


def sources(*modules: ModuleType) -> dict[str, str]:
    """The sha256 of each module's source, for a key: changed code must never read old entries.

    Takes modules, not names, so that a misspelled or removed module is an error.
    """
    return {module.__name__: _source(module.__name__) for module in modules}


def _source(module: str) -> str:
    """The sha256 of a module's source. Raises KeyError for a module that is not imported."""
    file = sys.modules[module].__file__
    assert file is not None, f"{module} has no source file"
    return _file_sha256(file)


@cache
def _file_sha256(file: str) -> str:
    return _sha256(Path(file).read_bytes())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
