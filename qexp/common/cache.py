"""Work that runs share, done once: a cache whose keys hold everything an entry depends on."""

import contextlib
import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, uint8

from qexp.common import ranks
from qexp.common.cache_entries import LOCK, default_folder
from qexp.common.errors import UserError
from qexp.common.files import atomic

log = logging.getLogger(__name__)

Build = Callable[[], dict[str, Tensor]]

_warned: set[Path] = set()  # folders that could not be written


@dataclass(frozen=True)
class Cache:
    """One safetensors file per entry, with its whole key and a checksum inside.

    An entry that is corrupt, cut short or made for another key is rebuilt. A folder that cannot be
    read or written costs one warning a process, never a run. Processes that want the same entry at
    the same time wait for the first.
    """

    folder: Path = field(default_factory=default_folder)

    def get(self, kind: str, key: Mapping[str, Any], build: Build) -> dict[str, Tensor]:
        """The entry of `key`, made by `build` if absent. What `build` raises goes through.

        `key` must be JSON; the source of the module that defines `build` is added to it, so that
        changed code never meets old entries. Tensors come back on the CPU, contiguous.
        """
        path, whole = self._place(kind, {**key, "code": _source(build.__module__)})
        if (found := _read(path, whole)) is not None:
            return found
        if ranks.rank():  # the first process may wait for this one in the midst of the same entry
            return plain(build())
        with _exclusive(path):
            if (found := _read(path, whole, quiet=True)) is not None:  # made while we waited
                return found
            built = plain(build())
            _write(path, whole, built)
            return built

    def alone(self, kind: str, key: Mapping[str, Any]) -> AbstractContextManager[None]:
        """While it is held no other process can hold it: between `find` and `put`."""
        return _exclusive(self._place(kind, key)[0])

    def find(self, kind: str, key: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """The entry of `key`, which must name its code (`sources`), or None."""
        return _read(*self._place(kind, key))

    def put(self, kind: str, key: Mapping[str, Any], tensors: dict[str, Tensor]) -> bool:
        """Keep an entry; False, with a warning, where that cannot be done."""
        path, whole = self._place(kind, key)
        return _write(path, whole, plain(tensors))

    def drop(self, kind: str, key: Mapping[str, Any]) -> None:
        """Forget an entry, if there is one."""
        with contextlib.suppress(OSError):
            self._place(kind, key)[0].unlink(missing_ok=True)

    def _place(self, kind: str, key: Mapping[str, Any]) -> tuple[Path, str]:
        whole = json.dumps({**key, "kind": kind}, sort_keys=True)
        return self.folder / kind / f"{_sha256(whole.encode())[:32]}.safetensors", whole


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
    """Said once a process: one full disk is not many news."""
    if folder not in _warned:
        _warned.add(folder)
        log.warning("cache %s cannot be written (%s): going on without it", folder, error)


def plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _read(path: Path, whole: str, quiet: bool = False) -> dict[str, Tensor] | None:
    """The entry, or None if it is absent or not what `whole` says."""
    try:
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        with contextlib.suppress(OSError):  # a cache that can only be read
            os.utime(path)  # what is used is pruned last
    except FileNotFoundError:  # pruned just now
        return None
    except (OSError, SafetensorError) as error:
        wrong = str(error)
    else:
        if said.get("key") != whole:
            wrong = "made for another key"
        elif said.get("checksum") != checksum(tensors):
            wrong = "checksum differs"
        else:
            return tensors
    if not quiet:
        log.warning("cache entry %s is not usable (%s): rebuilding it", path, wrong)
    return None


def _write(path: Path, whole: str, tensors: dict[str, Tensor]) -> bool:
    try:
        with atomic(path) as temporary:
            save_file(tensors, temporary, {"key": whole, "checksum": checksum(tensors)})
    except (OSError, SafetensorError, UserError) as error:
        _warn_once(path.parent.parent, error)
        return False
    return True


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Of names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(uint8).numpy().data)
    return digest.hexdigest()


def sources(*modules: ModuleType) -> dict[str, str]:
    """The sha256 of the source of each module, for a key: changed code must never meet old entries.

    Modules and not their names: a module that does not exist cannot be listed.
    """
    return {module.__name__: _source(module.__name__) for module in modules}


def _source(module: str) -> str:
    """Raises KeyError for a module that is not imported: its code would not be in the key."""
    file = sys.modules[module].__file__
    assert file is not None, f"{module} has no source file"
    return _file_sha256(file)


@cache
def _file_sha256(file: str) -> str:
    return _sha256(Path(file).read_bytes())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
