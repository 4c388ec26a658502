"""What went wrong first in a training step that is not finite."""

from typing import Any

import torch
from torch import Tensor, distributed, nn

from qexp.common.errors import UserError
from qexp.task import Batch, Task
from qexp.training.fsdp import full_tensor, is_single_process

ADVICE = "lower method.optimizer's rates or its clip, or train in trainer.precision=32-true."


class Diverged(UserError):
    """A fault that all processes that train together meet at the same step."""


def same_on_all_ranks(fault: Diverged, own: bool) -> Diverged:
    """In every process the fault of the first whose `own` it is."""
    if is_single_process():
        return fault
    said: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(said, (own, str(fault)))
    return Diverged(next(text for its, text in said if its))


def diagnose_loss(task: Task, batch: Batch, step: int, what: str = "loss") -> Diverged:
    """The first layer whose weights, else whose outputs, are not finite."""
    for name, parameter in task.model.named_parameters():
        if not full_tensor(parameter.detach()).isfinite().all():
            return Diverged(f"training: step {step}: {name} is no longer finite: {ADVICE}")
    first: list[str] = []
    handles = [
        module.register_forward_hook(_noting(name, first))
        for name, module in task.model.named_modules()
        if name
    ]
    with torch.no_grad():
        task.loss(batch)
    for handle in handles:
        handle.remove()
    where = f"the first outputs that are not finite leave {first[0]}" if first else "no layer shows"
    return Diverged(f"training: step {step}: the {what} is not finite; {where}: {ADVICE}")


def diagnose_gradient(task: Task, step: int) -> Diverged:
    """The layer nearest to the loss whose gradient is not finite: there it began. Where each is,
    and their norm is not, the one with the largest: steep surrogates multiply from layer to layer.
    """
    found = [
        (name.removeprefix("model."), full_tensor(parameter.grad))
        for name, parameter in task.named_parameters()
        if parameter.grad is not None
    ]
    bad = [name for name, grad in found if not grad.isfinite().all()]
    if bad:
        return Diverged(f"training: step {step}: the gradient of {bad[-1]} is not finite: {ADVICE}")
    name, grad = max(found, key=lambda pair: float(pair[1].abs().max()))
    return Diverged(
        f"training: step {step}: the norm of all gradients is not finite; the largest, "
        f"{float(grad.abs().max()):.1g}, is that of {name}: {ADVICE}"
    )


def _noting(name: str, first: list[str]) -> Any:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        made = output[0] if isinstance(output, tuple) else output
        if isinstance(made, Tensor) and made.is_floating_point() and not made.isfinite().all():
            first.append(name)

    return hook
