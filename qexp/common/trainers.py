"""Lightning trainers of one run: what training and evaluation share of their settings."""

import logging
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import lightning as L
import torch
from lightning.fabric.strategies import DDPStrategy
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy

from qexp.common import launch, progress, ranks
from qexp.common.errors import UserError

PRECISIONS: dict[str, Callable[[str], Precision]] = {  # from the type of the device
    "32-true": lambda _: Precision(),
    "bf16-mixed": lambda kind: MixedPrecision("bf16-mixed", kind),
}
WAIT = timedelta(hours=12)  # for another process, which may solve a large matrix


def check(device: torch.device, devices: int) -> None:
    """UserError if there are fewer devices on this machine, or `device` is not the process's."""
    if device.type == "cpu" or devices == 1:
        return
    if devices > (available := torch.accelerator.device_count()):
        raise UserError(f"trainer.devices={devices}: this machine has {available}; give fewer.")
    if device.index not in (None, ranks.local_rank()):
        raise UserError(
            f"device={device}: trainer.devices={devices} uses the first {devices} devices; give "
            "device=auto."
        )


def connect(device: torch.device, devices: int) -> None:
    """Make the process group of the run, in which CPU tensors can be exchanged too."""
    cpu = device.type == "cpu"
    backend = "gloo" if cpu else f"cpu:gloo,{device.type}:nccl"
    with _quiet():
        L.Fabric(
            accelerator=device.type,
            devices=devices,
            num_nodes=ranks.nodes(),
            strategy=DDPStrategy(process_group_backend=backend, timeout=WAIT),
            plugins=launch.cluster(),
        ).launch()


@contextmanager
def trainer(
    device: torch.device,
    devices: int,
    strategy: Strategy | str = "auto",
    precision: str = "32-true",
    **settings: Any,
) -> Iterator[L.Trainer]:
    """A trainer for a model on `device`, in `devices` processes on each machine.

    strategy: `auto` is one process. settings: of `L.Trainer`. Within the context, Lightning gives
    no hints, and Ctrl-C raises KeyboardInterrupt.
    """
    with _quiet():
        made = L.Trainer(
            accelerator=device.type,
            devices=devices,
            num_nodes=ranks.nodes(),
            # Lightning by itself takes every device for CUDA that is not the CPU.
            strategy=SingleDeviceStrategy(device) if strategy == "auto" else strategy,
            plugins=[launch.cluster(), PRECISIONS[precision](device.type)],
            use_distributed_sampler=False,
            enable_progress_bar=progress.drawn(),
            enable_model_summary=False,
            **settings,
        )
        with _interruptible(made):
            yield made


@contextmanager
def _interruptible(trainer: L.Trainer) -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt: Lightning exits with 1 and leaves the signal ignored."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        if not trainer.interrupted:
            raise
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from stop


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences Lightning's hardware hints and a deprecation warning of transformers."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\..*")
            yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
