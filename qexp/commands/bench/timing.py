"""Time and memory measurement for benchmarks, and the model to measure."""

import atexit
import os
import time
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from omegaconf import DictConfig
from torch.utils.flop_counter import FlopCounterMode

from qexp.config.instantiate import instantiate
from qexp.models.base import ModelSource
from qexp.models.device import as_task
from qexp.runs.provenance import peak_rss, reset_peak
from qexp.task import Batch, Task

PRODUCTS = 8  # of which the rate is measured


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


def resident(task: Task) -> int:
    """Bytes in memory now: of a GPU those allocated, otherwise all of the process."""
    if task.device.type != "cuda":
        return int(psutil.Process().memory_info().rss)
    return torch.cuda.memory_allocated()


def peak(task: Task) -> int:
    """Peak memory in bytes since the last call: of a GPU, otherwise of the whole process, where the
    system cannot reset its peak since it began."""
    if task.device.type != "cuda":
        held = peak_rss()
        reset_peak()
        return held
    torch.cuda.synchronize()
    held = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return held


def counter() -> FlopCounterMode:
    """Counts operations of products, those in place too, which torch's own list leaves out."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _in_place})


def _in_place(_: Any, a: Any, b: Any, **__: Any) -> int:
    return 2 * int(a[0] * a[1] * b[1])


def products(task: Task, side: int) -> dict[str, float]:
    """Operations per second of square products on the task's device, by dtype."""
    rates: dict[str, float] = {"side": float(side)}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(side, side, device=task.device, dtype=dtype) for _ in range(2))

        def multiply(a: Any = a, b: Any = b) -> None:
            for _ in range(PRODUCTS):
                torch.mm(a, b)

        multiply()
        seconds = spent(task, multiply)
        rates[f"{str(dtype).removeprefix('torch.')} rate"] = 2 * PRODUCTS * side**3 / seconds
    return rates


def show(stages: dict[str, float], unit: str) -> None:
    """Prints the seconds of each stage, their ratio to the stage `unit`, and the peak memory."""
    for name, seconds in stages.items():
        print(f"{name:<28}{seconds:8.1f} s {seconds / stages[unit]:8.2f} x {unit}")
    print(f"{'peak memory':<28}{peak_rss() / 2**30:8.2f} GiB")
