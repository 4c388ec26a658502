"""The clock and the scales: a model to measure, seconds, bytes, and how they are shown."""

import atexit
import os
import time
from collections.abc import Callable
from tempfile import TemporaryDirectory

import torch
from omegaconf import DictConfig

from qexp.config.instantiate import instantiate
from qexp.models.base import ModelSource
from qexp.models.device import as_task
from qexp.runs.provenance import peak_rss
from qexp.task import Batch, Task


def loaded(cfg: DictConfig) -> tuple[Task, list[Batch]]:
    """The model on its device and its calibration batches. What is done with them from here on
    finds an empty cache, which goes with the process."""
    source: ModelSource = instantiate(cfg.model)
    task = as_task(source, source.load(), cfg)
    batches: list[Batch] = instantiate(cfg.calibration)(task)
    folder = TemporaryDirectory()
    atexit.register(folder.cleanup)
    os.environ["QEXP_CACHE_DIR"] = folder.name
    return task, batches


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def spent(task: Task, work: Callable[[], object]) -> float:
    """Seconds of one call: of a GPU's clock, or of the processor's work, whoever else is at it."""
    if task.device.type != "cuda":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def peak(task: Task) -> int:
    """Bytes held at most: since the last call on a GPU, ever on a CPU."""
    if task.device.type != "cuda":
        return peak_rss()
    torch.cuda.synchronize()
    held = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return held


def show(stages: dict[str, float], unit: str) -> None:
    """Seconds of each stage and their ratio to `unit`."""
    for name, seconds in stages.items():
        print(f"{name:<28}{seconds:8.1f} s {seconds / stages[unit]:8.2f} x {unit}")
    print(f"{'peak memory':<28}{peak_rss() / 2**30:8.2f} GiB")
