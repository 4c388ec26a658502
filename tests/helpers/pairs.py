"""Work that two processes do together, both of them forks of this one: gloo does not connect in the
fork of a process that has had a group of its own."""

import os
import signal
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

Made = TypeVar("Made")


def together(work: Callable[[], Made]) -> Made:
    """What `work` makes, or raises, as rank 0, while another process does the same as rank 1."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        free.close()
        path = Path(folder) / "made"
        first, second = (_fork(work, rank, place, path) for rank in (0, 1))
        os.waitpid(first, 0)
        os.kill(second, signal.SIGKILL)
        os.waitpid(second, 0)
        made, failure = torch.load(path, weights_only=False)
    if failure is not None:
        raise failure
    return made


def apart(work: Callable[[], Made]) -> Made:
    """What `work` makes, or raises, in a fork: a process group that it has ends with it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made"
        os.waitpid(_fork(work, 0, {}, path), 0)
        made, failure = torch.load(path, weights_only=False)
    if failure is not None:
        raise failure
    return made


def _fork(work: Callable[[], Made], rank: int, place: dict[str, str], path: Path) -> int:
    if (child := os.fork()) != 0:
        return child
    try:
        if place:
            os.environ |= {**place, "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        try:
            result = (work(), None)
        except BaseException as error:
            result = (None, error)
        if rank == 0:
            torch.save(result, path)
    finally:
        os._exit(0)
