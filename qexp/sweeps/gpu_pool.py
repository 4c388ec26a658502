"""Resources of parallel jobs on one machine: threads, and a GPU for each worker."""

import os
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from qexp.common.errors import UserError
from qexp.common.files import locked

VISIBLE = "CUDA_VISIBLE_DEVICES"
_slot = ExitStack()  # of this process, until it ends
_taken: list[str] = []


def threads(launcher: DictConfig) -> int | None:
    """Threads of each job: those that a cluster's launcher reserves, or the cores divided by the
    number of parallel jobs. None: the launcher runs one job at a time."""
    for key in ("cpus_per_task", "ray.remote.num_cpus"):
        if (reserved := OmegaConf.select(launcher, key)) is not None:
            return max(int(reserved), 1)
    jobs = OmegaConf.select(launcher, "n_jobs")
    if jobs is None:
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max((cores or 1) // (jobs if jobs > 0 else cores or 1), 1)


def gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES would name them."""
    chosen = os.environ.get(VISIBLE)
    if chosen is not None:
        return [name for name in chosen.split(",") if name.strip()]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return []
    lines = listed.stdout.splitlines() if listed.returncode == 0 else []
    return [str(index) for index in range(sum(line.startswith("GPU ") for line in lines))]


def gpu_slots(per_gpu: int) -> int:
    """The number of parallel jobs with `per_gpu` on each GPU (`${gpu_slots:…}`). UserError if 0."""
    if not (found := len(gpus()) * per_gpu):
        raise UserError("hydra/launcher=gpu_pool: this machine shows no GPU; take cpu_pool")
    return found


class GpuPool(Callback):
    """Gives each worker process one GPU, which it shares with `per_gpu` - 1 others.

    Slots are locked files of the machine, so that two sweeps share it as one does, and a process
    keeps its slot until it ends: CUDA cannot change devices once it has begun.
    """

    def __init__(self, per_gpu: int = 1) -> None:
        self.per_gpu = per_gpu

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        if not _taken:
            _taken.append(free_gpu(gpus(), self.per_gpu))
            os.environ[VISIBLE] = _taken[0]


def register() -> None:
    """Make `${gpu_slots:K}` known to OmegaConf; calling it again changes nothing."""
    OmegaConf.register_new_resolver("gpu_slots", gpu_slots, replace=True)


def free_gpu(names: list[str], per_gpu: int) -> str:
    """The GPU of the first free slot, emptiest GPUs first; waits while there is none."""
    folder = Path(tempfile.gettempdir()) / f"qexp-gpus-{os.getuid()}"
    while True:
        for slot in range(per_gpu):
            for name in names:
                with ExitStack() as stack:
                    if stack.enter_context(locked(folder / f"{name}.{slot}", wait=False)):
                        _slot.push(stack.pop_all())
                        return name
        time.sleep(1)
