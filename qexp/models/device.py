"""Device of the model: all of it on one device, or one block at a time (offloading)."""

from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from qexp.common import captured, numerics, on_disk, ranks
from qexp.common.errors import UserError
from qexp.models.base import Loaded, ModelSource
from qexp.task import TASKS, Task


def place(task: Task, device: str, offload: bool) -> None:
    """Move the model to `device` (`auto`: the accelerator of this process's rank, else the CPU).

    offload: blocks stay in host memory and each is on the device only while it runs, so that the
    device holds one block, the embeddings and the head. Raises UserError for an unusable device.
    """
    target = device_of(device)
    if not offload:
        task.to(target)
        return
    inside = {module for block in task.blocks for module in block.modules()}
    for module in task.model.modules():
        if module not in inside:
            module._apply(lambda tensor: tensor.to(target), recurse=False)
    for block in task.blocks:
        block.register_forward_pre_hook(_mover(target))
        block.register_forward_hook(_mover(torch.device("cpu")), always_call=True)


def _mover(device: torch.device) -> Any:
    def move(block: nn.Module, *_: Any) -> None:
        on_disk.move(block, device)

    return move


def device_of(name: str) -> torch.device:
    """The device of the key `device`: in a process of several, that of its rank. UserError for an
    unusable one."""
    try:
        device: torch.device = numerics.device_of(name)
        if device.index is None and device.type != "cpu" and ranks.local_rank():
            device = torch.device(device.type, ranks.local_rank())
        torch.empty(0, device=device).cpu()  # the device meta holds no numbers
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device={name} cannot be used here ({str(error).splitlines()[0]}); give cpu, cuda, "
            "cuda:N or auto."
        ) from error
    return device


def as_task(source: ModelSource, loaded: Loaded, cfg: DictConfig) -> Task:
    """The task of a loaded model with its online maps, on the device of the configuration, whose
    numerics this process has from here on."""
    numerics.of(cfg).apply()
    captured.replay(bool(cfg.get("replay", False)))
    task = TASKS[source.objective](loaded.model, loaded.tokenizer).eval()
    place(task, cfg.device, cfg.offload)
    loaded.put_maps(task)
    return task
