"""Work that two processes do together, the second a fork of the first."""

import os
import signal
import socket
from collections.abc import Callable
from typing import TypeVar

import pytest

Made = TypeVar("Made")


def together(work: Callable[[], Made]) -> Made:
    """What `work` makes in this process, with another that does the same as rank 1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in place.items():
            patch.setenv(name, value)
        if (other := os.fork()) == 0:
            try:
                os.environ["LOCAL_RANK"] = "1"
                work()
            finally:
                os._exit(0)
        try:
            patch.setenv("LOCAL_RANK", "0")
            return work()
        finally:
            os.kill(other, signal.SIGKILL)
            os.waitpid(other, 0)
