"""Collective operations of the processes of one run, on torch.distributed; identities in one
process.

Every process must call them, in the same order. They are of the default process group, which
`launch.processes` makes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn

Made = TypeVar("Made")


def is_single_process() -> bool:
    """Whether the run has one process, or its processes are not connected."""
    return not distributed.is_initialized() or distributed.get_world_size() == 1


def rank() -> int:
    """Rank of this process in the process group; 0 in a single process."""
    return 0 if is_single_process() else distributed.get_rank()


def count() -> int:
    """Number of processes in the process group."""
    return 1 if is_single_process() else distributed.get_world_size()


def gathered(value: Made) -> list[Made]:
    """The values of all processes, by rank; those of several have their tensors on the CPU."""
    if is_single_process():
        return [value]
    with BytesIO() as buffer:
        torch.save(value, buffer)  # plain pickle has no uint16 tensors
        own = buffer.getvalue()
    packed = [own] * distributed.get_world_size()
    distributed.all_gather_object(packed, own)
    return [torch.load(BytesIO(x), map_location="cpu", weights_only=False) for x in packed]


def from_first(make: Callable[[], Made]) -> Made:
    """What `make` gives in the first process, in every process. Raises its exception in all."""
    return _result(gathered(_attempt(make) if rank() == 0 else (None, None))[0])


def exchanged(make: Callable[[], Made]) -> list[Made]:
    """What `make` gives in each process, by rank. An exception of one process is raised in all, so
    that none waits for it, and each reports the same."""
    if is_single_process():
        return [make()]
    attempts = gathered(_attempt(make))
    failed = [each for each in attempts if each[1] is not None]
    return [_result(each) for each in failed or attempts]


@torch.no_grad()
def synchronize(module: nn.Module) -> None:
    """Give parameters and buffers the values that they have in the first process. Those without
    storage (device `meta`) stay."""
    if is_single_process():
        return
    for tensor in (*module.parameters(), *module.buffers()):
        if not tensor.is_meta:
            whole = tensor.data.contiguous()
            distributed.broadcast(whole, 0)
            tensor.data.copy_(whole)


@dataclass(frozen=True)
class Share:
    """The part of some data that this process has: all of them, or those that no other has."""

    divided: bool = False

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the processes among which the data are divided; changes `tensor`."""
        return self._reduced(tensor, distributed.ReduceOp.SUM)

    def max(self, tensor: Tensor) -> Tensor:
        """The elementwise maximum; changes `tensor`."""
        return self._reduced(tensor, distributed.ReduceOp.MAX)

    def gathered(self, value: Made) -> list[Made]:
        """The values of those processes, by rank."""
        return gathered(value) if self.divided else [value]

    def _reduced(self, tensor: Tensor, operation: distributed.ReduceOp.RedOpType) -> Tensor:
        if self.divided:
            distributed.all_reduce(tensor, operation)
        return tensor


WHOLE = Share()


def _attempt(make: Callable[[], Made]) -> tuple[Made | None, Exception | None]:
    if is_single_process():
        return make(), None
    try:
        return make(), None
    except Exception as error:
        return None, error


def _result(attempt: tuple[Made | None, Exception | None]) -> Made:
    made, error = attempt
    if error is not None:
        raise error
    return made  # type: ignore[return-value]
