"""Diagnosis of a non-finite training step: the first layer with NaN or infinity."""

from typing import Any

import torch
from torch import Tensor, distributed, nn

from qexp.common.collectives import is_single_process
from qexp.common.errors import UserError
from qexp.task import Batch, Task
from qexp.training.fsdp import full_tensor

ADVICE = "lower method.optimizer's rates or its clip, or train in trainer.precision=32-true."


class Diverged(UserError):
    """A loss or gradient that is not finite; raised in all training processes at the same step."""


def same_on_all_ranks(fault: Diverged, own: bool) -> Diverged:
    """The same fault in every process: that of the first process where `own` is true.

    own: whether this process found the fault itself.
    """
    if is_single_process():
        return fault
    faults: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(faults, (own, str(fault)))
    return Diverged(next(text for is_own, text in faults if is_own))


def diagnose_loss(task: Task, batch: Batch, step: int, what: str = "loss") -> Diverged:
    """Reports the first layer with non-finite weights, or else with non-finite outputs.

    step: counted from 0. what: the quantity that is not finite, for the message.
    """
    for name, parameter in task.model.named_parameters():
        if not full_tensor(parameter.detach()).isfinite().all():
            return Diverged(f"training: step {step}: {name} is not finite any more: {ADVICE}")
    first: list[str] = []
    handles = [
        module.register_forward_hook(_record_if_not_finite(name, first))
        for name, module in task.model.named_modules()
        if name
    ]
    with torch.no_grad():
        task.loss(batch)
    for handle in handles:
        handle.remove()
    where = "the outputs of all layers are finite"
    if first:
        where = f"the first layer with non-finite outputs is {first[0]}"
    return Diverged(f"training: step {step}: the {what} is not finite; {where}: {ADVICE}")


def diagnose_gradient(task: Task, step: int) -> Diverged:
    """Reports the layer nearest to the loss with a non-finite gradient, where it originated.

    If all gradients are finite and only their norm overflows, reports the largest gradient: steep
    surrogate gradients multiply from layer to layer.
    """
    gradients = [
        (name.removeprefix("model."), full_tensor(parameter.grad))
        for name, parameter in task.named_parameters()
        if parameter.grad is not None
    ]
    bad = [name for name, grad in gradients if not grad.isfinite().all()]
    if bad:
        return Diverged(f"training: step {step}: the gradient of {bad[-1]} is not finite: {ADVICE}")
    name, grad = max(gradients, key=lambda pair: float(pair[1].abs().max()))
    return Diverged(
        f"training: step {step}: the norm of all gradients is not finite; the largest gradient, "
        f"{float(grad.abs().max()):.1g}, is that of {name}: {ADVICE}"
    )


def _record_if_not_finite(name: str, layers: list[str]) -> Any:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        x = output[0] if isinstance(output, tuple) else output
        if isinstance(x, Tensor) and x.is_floating_point() and not x.isfinite().all():
            layers.append(name)

    return hook
