"""Tensors in temporary files that are mapped into memory, and the pages of them that stay there.

The file of a mapped tensor has no name and ends with the process. Values are read and written in
place like those of any tensor; the pages that were touched leave memory again as soon as more than
`RESIDENT` bytes of all mapped files are there, and come back from the file at the next touch.
"""

import math
import mmap
import os
import shutil
import sys
import tempfile
import threading
import weakref
from collections.abc import MutableMapping
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from qexp.common.errors import UserError

RESIDENT = 256 * 2**20
ARENA = 64 * 2**20  # bytes of a file, at least: each has a file descriptor
ALIGNMENT = 64  # bytes, that of torch's own allocations
PAUSE = 0.02  # seconds between two looks at the memory; at 5 GB/s 100 MB are touched meanwhile

# By the address of each tensor's storage, which no other tensor has while the file is mapped.
_arenas: "weakref.WeakValueDictionary[int, _Arena]" = weakref.WeakValueDictionary()
_homes: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()
_lock = threading.Lock()
_newest: "_Arena | None" = None
_keeper: threading.Thread | None = None


class _Arena(mmap.mmap):
    """A mapped file that tensors are placed in, one after another; it lives as long as they do."""

    used = 0


def empty(shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A mapped tensor of zeros. UserError where the folder of temporary files has no room for it,
    or is itself in memory."""
    global _newest
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.empty(shape, dtype=dtype)
    with _lock:
        if _newest is None or _newest.used + size > len(_newest):
            _newest = _opened(max(size, ARENA))
        arena, start = _newest, _newest.used
        arena.used += -(-size // ALIGNMENT) * ALIGNMENT
    # Each has a storage of its own: writers copy tensors that share one.
    made = torch.frombuffer(arena, dtype=dtype, count=math.prod(shape), offset=start)
    _arenas[made.data_ptr()] = arena
    return made.view(shape)


def copied(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A mapped copy of a tensor, in its dtype or another one. Errors as `empty`."""
    return empty(tensor.shape, dtype or tensor.dtype).copy_(tensor.detach())


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor was made by this module, or is a view of one that was."""
    return tensor.device.type == "cpu" and tensor.untyped_storage().data_ptr() in _arenas


def assign(tensor: Tensor, value: Tensor) -> None:
    """Give a tensor a value of its shape, in its own dtype, device and place. A new tensor in place
    of weights that were mapped from a file would leave both in memory."""
    tensor.detach().copy_(value)


def move(module: nn.Module, device: torch.device) -> None:
    """Move a module; mapped parameters return into their place on disk, with what changed."""
    for parameter in module.parameters():
        if is_mapped(parameter) and device.type != "cpu":
            _homes[parameter] = parameter.data
    module.to(device)
    for parameter in module.parameters():
        if parameter.device.type == "cpu" and (home := _homes.pop(parameter, None)) is not None:
            parameter.data = home.copy_(parameter.data)


def like(tensor: Tensor) -> Tensor:
    """A copy of a tensor: of a mapped one a mapped copy."""
    return copied(tensor) if is_mapped(tensor) else tensor.detach().clone()


def check_room(size: int, key: str) -> None:
    """UserError, naming a key of the configuration, where temporary files cannot take `size`
    bytes."""
    folder = Path(tempfile.gettempdir()).resolve()
    mounts = [part for part in psutil.disk_partitions(all=True) if folder.is_relative_to(part[1])]
    if mounts and max(mounts, key=lambda part: len(part.mountpoint)).fstype in ("tmpfs", "ramfs"):
        raise UserError(
            f"{key}: temporary files in {folder} are held in memory; set TMPDIR to a folder on disk"
        )
    if (free := shutil.disk_usage(folder).free) < size:
        raise UserError(
            f"{key}: needs {size / 2**30:.1f} GiB of temporary files, and {folder} has "
            f"{free / 2**30:.1f} GiB free; set TMPDIR to another folder"
        )


def _opened(size: int) -> _Arena:
    try:
        with tempfile.TemporaryFile() as file:
            if hasattr(os, "posix_fallocate"):  # a disk that is full later would end the process
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            arena = _Arena(file.fileno(), size)
    except OSError as error:
        raise UserError(
            f"{tempfile.gettempdir()}: has no room for {size / 2**30:.2f} GiB of temporary files "
            f"({error.strerror}); set TMPDIR to another folder"
        ) from error
    _watch()
    return arena


def _watch() -> None:
    """Start the thread that keeps few pages resident, once in each process; Linux alone reports
    them."""
    global _keeper
    if sys.platform == "linux" and (_keeper is None or not _keeper.is_alive()):
        _keeper = threading.Thread(target=_keep, name="mapped tensors", daemon=True)
        _keeper.start()


def _keep() -> None:
    """Drop pages when too many are resident. Mappings are shared with their files, so that nothing
    that was written is lost."""
    process, event = psutil.Process(), threading.Event()
    idle = process.memory_info().shared  # code of libraries
    while not event.wait(PAUSE):
        if process.memory_info().shared - idle > RESIDENT:
            drop()


def drop() -> None:
    """Let all pages of mapped files leave memory, where the system can be asked for that."""
    for arena in {id(each): each for each in list(_arenas.values())}.values():
        if hasattr(mmap, "MADV_DONTNEED"):
            arena.madvise(mmap.MADV_DONTNEED)
