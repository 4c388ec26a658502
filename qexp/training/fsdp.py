"""Training with every parameter, its gradient and its moments dealt out over the processes."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

WHOLE = StateDictOptions(full_state_dict=True)


class FullySharded(DDPStrategy):
    """Fully sharded data-parallel (2304.11277) by torch's `fully_shard`: a process holds its rows
    of every parameter, and all of a block's only while that block computes.

    Lightning's own strategies for it want a GPU, or cannot fork. Checkpoints are those of one
    process. The model comes whole and is whole again, the same objects, where training ends.
    """

    model: Any  # the module itself
    modules: Mapping[nn.Module, tuple[type, dict[str, Any]]] = MappingProxyType({})

    def configure_ddp(self) -> None:
        training: Any = self.model
        # What `fully_shard` changes has no way back of its own: classes, hooks and parameters.
        self.modules = {
            module: (type(module), {k: _own(v) for k, v in vars(module).items()})
            for module in training.modules()
        }
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        for module in (*training.task.blocks, training):
            fully_shard(module, mesh=mesh)
        for name in training.forwards:
            register_fsdp_forward_method(training, name)
        for parameter in self._parameters():
            parameter.data = parameter.data.new_empty(0)  # others hold on to it

    def on_train_end(self) -> None:
        """The model as it came, with the trained values."""
        with unsharded(self.model):
            for parameter, trained in self._parameters().items():
                parameter.data = trained.detach().clone()
        self._unwrap()

    def on_exception(self, exception: BaseException) -> None:
        self._unwrap()  # else what Lightning does next fails too, and hides the reason

    def _unwrap(self) -> None:
        for module, (kind, attributes) in self.modules.items():
            module.__class__ = kind
            for name in vars(module).keys() - attributes.keys():
                delattr(module, name)
            vars(module).update({k: v for k, v in attributes.items() if isinstance(v, dict)})

    def _parameters(self) -> dict[nn.Parameter, Any]:
        """What each parameter was, and what stands in its place."""
        return {
            parameter: module._parameters[name]
            for module, (_, attributes) in self.modules.items()
            for name, parameter in attributes["_parameters"].items()
            if parameter is not None
        }

    def lightning_module_state_dict(self) -> dict[str, Any]:
        self.model.reshard()  # validation, without a backward, leaves what is outermost whole
        return super().lightning_module_state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return get_optimizer_state_dict(self.model, optimizer, options=WHOLE)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            set_optimizer_state_dict(self.model, optimizer, state, options=WHOLE)


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """All parameters at hand, in every process."""
    shards = [each for each in module.modules() if isinstance(each, FSDPModule)]
    for each in shards:
        each.unshard()
    try:
        yield
    finally:
        for each in shards:
            each.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor of which every process may hold a part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_single_process() -> bool:
    """Whether no other process trains with this one."""
    return not distributed.is_initialized() or distributed.get_world_size() == 1


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean over the processes that train together; the tensor itself where there is one."""
    if is_single_process():
        return tensor
    total = tensor.detach().clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()


def _own(value: Any) -> Any:
    return value.copy() if isinstance(value, dict) else value
