"""Time and memory measurement for benchmarks, and the model to measure."""

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
    """The model on its device and its calibration batches.

    From here on the process has an empty cache, which is deleted when it ends.
    """
    source: ModelSource = instantiate(cfg.model)
    task = as_task(source, source.loaded(), cfg)
    batches: list[Batch] = instantiate(cfg.calibration)(task)
    empty_cache()
    return task, batches


def empty_cache() -> None:
    """Gives the process an empty cache, which is deleted when it ends."""
    folder = TemporaryDirectory()
    atexit.register(folder.cleanup)
    os.environ["QEXP_CACHE_DIR"] = folder.name


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def spent(task: Task, work: Callable[[], object]) -> float:
    """Seconds of one call: wall time on an accelerator, otherwise processor time, as CPUs may be
    shared."""
    if task.device.type == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    module = torch.get_device_module(task.device)
    module.synchronize()
    start = time.perf_counter()
    work()
    module.synchronize()
    return time.perf_counter() - start


def peak(task: Task) -> int:
    """Peak memory in bytes: on a GPU since the last call, otherwise of the whole process."""
    if task.device.type != "cuda":
        return peak_rss()
    torch.cuda.synchronize()
    held = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return held


def show(stages: dict[str, float], unit: str) -> None:
    """Prints the seconds of each stage, their ratio to the stage `unit`, and the peak memory."""
    for name, seconds in stages.items():
        print(f"{name:<28}{seconds:8.1f} s {seconds / stages[unit]:8.2f} x {unit}")
    print(f"{'peak memory':<28}{peak_rss() / 2**30:8.2f} GiB")
