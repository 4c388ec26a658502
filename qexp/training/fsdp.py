"""Fully sharded data-parallel training (FSDP), and collectives for training processes."""

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

from qexp.common.collectives import is_single_process

WHOLE = StateDictOptions(full_state_dict=True)


class FullySharded(DDPStrategy):
    """Fully sharded data-parallel training (2304.11277) with torch's `fully_shard`.

    A process holds its rows of every parameter, gradient and moment, and all rows of a block only
    while that block computes. Lightning's own FSDP strategies need a GPU, or cannot fork.
    Checkpoints have the format of a single process. After training the model is unsharded again,
    with the original objects.
    """

    model: Any  # the module itself
    modules: Mapping[nn.Module, tuple[type, dict[str, Any]]] = MappingProxyType({})

    def configure_ddp(self) -> None:
        training: Any = self.model
        # `fully_shard` cannot be undone: save the classes, hooks and parameters that it changes.
        self.modules = {
            module: (type(module), {k: _copied(v) for k, v in vars(module).items()})
            for module in training.modules()
        }
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        for module in (*training.task.blocks, training):
            fully_shard(module, mesh=mesh)
        for name in training.forwards:
            register_fsdp_forward_method(training, name)
        for parameter in self._parameters():
            # frees the memory; the parameter itself is still referenced elsewhere
            parameter.data = parameter.data.new_empty(0)

    def on_train_end(self) -> None:
        """Restores the original modules, with the trained values."""
        with unsharded(self.model):
            for parameter, trained in self._parameters().items():
                parameter.data = trained.detach().clone()
        self._unwrap()

    def on_exception(self, exception: BaseException) -> None:
        self._unwrap()  # otherwise Lightning's clean-up fails too and hides the exception

    def _unwrap(self) -> None:
        for module, (kind, attributes) in self.modules.items():
            module.__class__ = kind
            for name in vars(module).keys() - attributes.keys():
                delattr(module, name)
            vars(module).update({k: v for k, v in attributes.items() if isinstance(v, dict)})

    def _parameters(self) -> dict[nn.Parameter, Any]:
        """The sharded parameter by the original one."""
        return {
            parameter: module._parameters[name]
            for module, (_, attributes) in self.modules.items()
            for name, parameter in attributes["_parameters"].items()
            if parameter is not None
        }

    def lightning_module_state_dict(self) -> dict[str, Any]:
        self.model.reshard()  # validation has no backward pass, which reshards the root module
        return super().lightning_module_state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return get_optimizer_state_dict(self.model, optimizer, options=WHOLE)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            set_optimizer_state_dict(self.model, optimizer, state, options=WHOLE)


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Gathers all parameters in every process for the context."""
    shards = [each for each in module.modules() if isinstance(each, FSDPModule)]
    for each in shards:
        each.unshard()
    try:
        yield
    finally:
        for each in shards:
            each.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one; collective, all processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean over training processes; the tensor itself for one process."""
    if is_single_process():
        return tensor
    total = tensor.detach().clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, dict) else value
