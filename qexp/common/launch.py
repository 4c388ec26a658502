"""Processes of one run on several devices.

`torchrun`, or SLURM's `srun`, starts all processes with the same command. Otherwise the run starts
the others, which run its saved configuration.
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
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from torch import distributed

from qexp.common import ranks
from qexp.common.errors import UserError

CALL = "QEXP_CALL"  # file descriptor of a started process's socket to the process that started it
CONFIG = Path(".hydra") / "config.yaml"


def cluster() -> ClusterEnvironment:
    """Lightning's cluster environment: torchrun, or processes of this run."""
    return TorchElasticEnvironment() if TorchElasticEnvironment.detect() else _Environment()


def adopt_slurm(count: int, strategy: str) -> None:
    """Take rank and address from SLURM, if `srun` started the processes of one run: those of a run
    with one device and no strategy may be different jobs. UserError for another number of them."""
    tasks = int(os.environ.get("SLURM_NTASKS", 1))
    if tasks == 1 or ranks.world() > 1 or (count == 1 and strategy == "auto"):
        return
    nodes = int(os.environ.get("SLURM_NNODES", 1))
    if count * nodes != tasks:
        raise UserError(
            f"trainer.devices={count}: srun started {tasks} tasks on {nodes} machine(s); give "
            f"trainer.devices={tasks // nodes}, or --ntasks-per-node={count}."
        )
    slurm = SLURMEnvironment()
    os.environ |= {
        "MASTER_ADDR": slurm.main_address,
        "MASTER_PORT": str(slurm.main_port),
        "WORLD_SIZE": str(tasks),
        "LOCAL_WORLD_SIZE": str(count),
        "RANK": str(slurm.global_rank()),
        "LOCAL_RANK": str(slurm.local_rank()),
        "NODE_RANK": str(slurm.node_rank()),
    }


class _Environment(LightningEnvironment):
    def teardown(self) -> None:
        """Keeps the environment variables: the process keeps its rank after a trainer."""


@contextmanager
def processes(folder: Path | None, count: int) -> Iterator[None]:
    """Provides `count` processes on this machine for the context, with divided CPU threads.

    Processes that do not exist yet are started from the run's folder. Within a context of a run,
    another one only checks the count.

    Raises UserError if the number of running processes is not `count`, if this is not a run of
    the command qexp, or if a process ends early.
    """
    elastic, world, nodes = TorchElasticEnvironment.detect(), ranks.world(), ranks.nodes()
    if distributed.is_initialized():  # by the run
        if count * nodes != world:
            raise UserError(
                f"trainer.devices={count} of a step: the run has {world} processes; give this "
                f"trainer too devices={world // nodes} and strategy=ddp (a transform's trainer: "
                f"+transform.trainer.devices={world // nodes} +transform.trainer.strategy=ddp)."
            )
        yield
        return
    if (elastic or world > 1) and count * nodes != world:
        raise UserError(
            f"trainer.devices={count}: {world} processes were started on {nodes} machine(s); give "
            f"trainer=ddp trainer.devices={world // nodes}, or start one process."
        )
    with ExitStack() as stack:
        stack.enter_context(_losses_reported(count))
        stack.callback(_leave)
        if count > 1:
            stack.enter_context(_shared(count))
        if not elastic and world == 1:
            stack.enter_context(_started(folder, count))
        _answer()
        yield


@contextmanager
def _losses_reported(count: int) -> Iterator[None]:
    """UserError for what torch raises when another process does not answer any more."""
    try:
        yield
    except Exception as error:
        if not _lost_peer(error):
            raise
        raise UserError(
            f"trainer.devices={count}: another process of the run ended; its output is above. The "
            "same command resumes."
        ) from error


def _lost_peer(error: Exception) -> bool:
    return isinstance(error, distributed.DistError) or "gloo" in str(error)


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


@contextmanager
def _shared(count: int) -> Iterator[None]:
    """Divides the CPU threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(threads // count, 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _started(folder: Path | None, count: int) -> Iterator[None]:
    """Starts the other processes of the run in `folder`, and waits until all reach this point."""
    if count > 1 and (folder is None or not (folder / CONFIG).is_file()):
        raise UserError(
            f"trainer.devices={count}: the run has one process; give the root key trainer.devices, "
            "which starts those of the command qexp, or start this program with torchrun."
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
            call, remote = socket.socketpair()
            with remote:
                rank = {"LOCAL_RANK": str(number), CALL: str(remote.fileno())}
                others.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "qexp.sweeps.worker", str(folder)],
                        env={**os.environ, **place, **rank},
                        pass_fds=[remote.fileno()],
                    )
                )
            calls.append(call)
        for number, call in enumerate(calls, 1):
            if not _receive(call):
                raise UserError(
                    f"trainer.devices={count}: process {number + 1} ended before the run began; "
                    "its output is above."
                )
        for call in calls:
            _send(call)
        with _environment(**place):
            yield
        _wait(others, 60.0)  # they end without further work
    except Exception as error:
        codes = [code for code in _wait(others, 5.0) if code] if _lost_peer(error) else []
        if not codes:
            raise
        killed = "; possibly killed by the system for lack of memory" if codes[0] == -9 else ""
        raise UserError(
            f"trainer.devices={count}: {len(codes)} of the other processes ended (exit code "
            f"{codes[0]}{killed}); their output is above. The same command resumes."
        ) from error
    finally:
        for call in calls:
            call.close()
        for other in others:
            if other.poll() is None:
                other.kill()
                other.wait()


def _wait(others: Sequence[subprocess.Popen[bytes]], seconds: float) -> list[int | None]:
    """Waits at most `seconds`. Returns exit codes, None for processes that still run."""
    until = time.monotonic() + seconds
    for other in others:
        with suppress(subprocess.TimeoutExpired):
            other.wait(max(until - time.monotonic(), 0.0))
    return [other.poll() for other in others]


@contextmanager
def _environment(**changes: str) -> Iterator[None]:
    """Sets environment variables for the context."""
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
    """In a started process, reports to its starter and waits until all processes have reported.

    A process that waits in torch instead would not notice that another one ended. Raises
    ranks.Done if the starter has ended.
    """
    number = os.environ.pop(CALL, None)
    if number is None:
        return
    with socket.socket(fileno=int(number)) as call:
        _send(call)
        if not _receive(call):
            raise ranks.Done


def _send(call: socket.socket) -> None:
    with suppress(OSError):  # _receive detects a process that has ended
        call.send(b"!")


def _receive(call: socket.socket) -> bool:
    try:
        return bool(call.recv(1))
    except OSError:
        return False
