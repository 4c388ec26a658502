"""The other processes of a run that trains on several devices.

Under `torchrun` all of them begin at once, each with the whole command; otherwise the run starts
the others as it comes to its training, and they repeat it from its configuration up to there.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    TorchElasticEnvironment,
)
from torch import distributed

from qexp.common import ranks
from qexp.common.errors import UserError

CALL = "QEXP_CALL"  # number of the socket on which a process that was started is called
CONFIG = Path(".hydra") / "config.yaml"


def cluster() -> ClusterEnvironment:
    """Who started the processes, for Lightning. Slurm's tasks are none of them: each may be at
    another job of a sweep."""
    return TorchElasticEnvironment() if TorchElasticEnvironment.detect() else _Told()


class _Told(LightningEnvironment):
    def teardown(self) -> None:
        """What the environment says stays: the process is still the one it was."""


@contextmanager
def processes(folder: Path | None, count: int) -> Iterator[None]:
    """`count` processes on this machine, each with its share of the threads, as long as the context
    lasts; those that `torchrun` did not start are started. UserError if there are others than
    `count`, or if one of them ends before all are there."""
    elastic, world, nodes = TorchElasticEnvironment.detect(), ranks.world(), ranks.nodes()
    if (elastic or world > 1) and count * nodes != world:
        raise UserError(
            f"trainer.devices={count}: {world} processes were started on {nodes} machine(s); give "
            f"trainer=ddp trainer.devices={world // nodes}, or start one process."
        )
    with ExitStack() as stack:
        if not distributed.is_initialized():
            stack.callback(_leave)
        if count > 1:
            stack.enter_context(_shared(count))
        if not elastic and world == 1:
            stack.enter_context(_started(folder, count))
        _answer()
        yield


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


@contextmanager
def _shared(count: int) -> Iterator[None]:
    """A share of the threads, which Lightning would choose if the environment did not name it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(share := max(threads // count, 1))
    try:
        with _environment(OMP_NUM_THREADS=str(share)):
            yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _started(folder: Path | None, count: int) -> Iterator[None]:
    """The other processes of the run in `folder`, all of them at the same point as this one."""
    if count > 1 and (folder is None or not (folder / CONFIG).is_file()):
        raise UserError(
            f"trainer.devices={count}: only the command qexp starts other processes; start this "
            "program with torchrun."
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    place |= {"WORLD_SIZE": str(count), "LOCAL_RANK": "0"}
    others: list[subprocess.Popen[bytes]] = []
    calls: list[socket.socket] = []
    try:
        for number in range(1, count):
            own, theirs = socket.socketpair()
            with theirs:
                told = {"LOCAL_RANK": str(number), CALL: str(theirs.fileno())}
                others.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "qexp.sweeps.worker", str(folder)],
                        env={**os.environ, **place, **told},
                        pass_fds=[theirs.fileno()],
                    )
                )
            calls.append(own)
        for number, call in enumerate(calls, 1):
            if not _heard(call):
                raise UserError(
                    f"trainer.devices={count}: process {number + 1} ended before training began; "
                    "what it said stands above."
                )
        for call in calls:
            _say(call)
        with _environment(**place):
            yield
        _ended(others, 60.0)  # they have nothing left to do
    except Exception as error:
        gone = isinstance(error, distributed.DistError) or "gloo" in str(error)
        codes = [code for code in _ended(others, 5.0) if code] if gone else []
        if not codes:
            raise
        killed = "; the system kills what takes too much memory" if codes[0] == -9 else ""
        raise UserError(
            f"trainer.devices={count}: {len(codes)} of the other processes ended in the midst of "
            f"training (exit code {codes[0]}{killed}); what they said stands above."
        ) from error
    finally:
        for call in calls:
            call.close()
        for other in others:
            if other.poll() is None:
                other.kill()
                other.wait()


def _ended(others: Sequence[subprocess.Popen[bytes]], seconds: float) -> list[int | None]:
    """Exit codes after some time at most; None of those that go on."""
    until = time.monotonic() + seconds
    for other in others:
        with suppress(subprocess.TimeoutExpired):
            other.wait(max(until - time.monotonic(), 0.0))
    return [other.poll() for other in others]


@contextmanager
def _environment(**changes: str) -> Iterator[None]:
    """These variables, as long as the context lasts."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _answer() -> None:
    """Say to the process that started this one, if one did, that it is here, and wait until all
    are: a process that waited for others in torch would not see that one of them ended."""
    number = os.environ.pop(CALL, None)
    if number is None:
        return
    with socket.socket(fileno=int(number)) as call:
        _say(call)
        if not _heard(call):
            raise ranks.Done


def _say(call: socket.socket) -> None:
    with suppress(OSError):  # who is gone is found out when its answer is missing
        call.send(b"!")


def _heard(call: socket.socket) -> bool:
    try:
        return bool(call.recv(1))
    except OSError:
        return False
