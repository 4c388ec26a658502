"""Placement of activation quantizers: sites of a model by name, and the hooks that round there."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qexp.arch import Arch, Group
from qexp.common.errors import UserError
from qexp.quantizers.attention import CACHE, OPERANDS
from qexp.quantizers.operands import inside, operand_names
from qexp.quantizers.site_input import See, site_input
from qexp.task import Task

Make = Callable[[], nn.Module]


class Site(NamedTuple):
    """A tensor that can carry a quantizer, named by the module it enters or leaves.

    readers: modules that read it, in execution order, where it is not written in place.
    """

    name: str
    put: Callable[[nn.Module], Any]
    module: nn.Module
    leaves: bool = False
    readers: tuple[nn.Module, ...] = ()

    def watch(self, see: See) -> RemovableHandle:
        """Call `see` with the tensor, after an online map and before a quantizer rounds it, until
        the handle is removed."""
        if self.readers:
            return site_input(self.readers).watch(see)
        if self.leaves:
            return self.module.register_forward_hook(
                lambda _, __, y: see(y[0] if isinstance(y, tuple) else y), prepend=True
            )
        return self.module.register_forward_pre_hook(lambda _, args: see(args[0]), prepend=True)


class Placement(ABC):
    operands: tuple[str, ...] = ()  # of every block's attention, by their names in it

    @abstractmethod
    def sites(self, task: Task) -> list[Site]:
        """The sites that enter or leave a module; operands inside attention are not among them."""

    def names(self, task: Task) -> list[str]:
        """Of all sites, `operands` included."""
        return [site.name for site in self.sites(task)] + operand_names(task, self.operands)

    def __call__(self, task: Task, make: Make) -> dict[str, nn.Module]:
        """Put a quantizer made by `make` on each site, and leave those of earlier placements; the
        quantizers by site name."""
        return _put(self.sites(task), make) | inside(task, lambda _: make(), self.operands)


@dataclass(frozen=True)
class LinearInputs(Placement):
    """The input of every linear of the blocks, one quantizer for linears that share it."""

    def sites(self, task: Task) -> list[Site]:
        return _linear_inputs(task, task.arch.groups)


@dataclass(frozen=True)
class KVCache(Placement):
    """Keys (after the rotary embedding, as a cache holds them) and values, each head's vector of
    each token on its own."""

    operands = CACHE

    def sites(self, task: Task) -> list[Site]:
        return []


@dataclass(frozen=True)
class ProjectedKV(Placement):
    """What the projections of keys and values return: before the rotary embedding, all heads of a
    token in one vector (LLM-QAT)."""

    def __call__(self, task: Task, make: Make) -> dict[str, nn.Module]:
        return _put(self.sites(task), make)

    def sites(self, task: Task) -> list[Site]:
        names = task.arch.groups[0].linears  # the first group is the attention's
        if len(names) != 3:
            raise UserError(
                f"kv.placement: {names[0]} makes keys and values together with queries; choose one "
                "that rounds what a cache holds (kv=int8_token)."
            )
        sites = []
        for index, block in enumerate(task.blocks):
            for operand, linear in zip(CACHE, names[1:], strict=True):
                site = _output(linear, block.get_submodule(linear))
                name = f"{task.arch.blocks}.{index}.attention.projected_{operand}"
                sites.append(site._replace(name=name))
        return sites


@dataclass(frozen=True)
class AllOps(Placement):
    """The result of every operation: linear inputs and outputs, norms, activation functions,
    attention operands, scores (before the mask) and probabilities, embeddings, residual sums,
    logits. A result that only linears read carries the quantizer of their input and no other one.
    This is the setting of Quadapter (2211.16912); biases stay float."""

    operands = OPERANDS

    def sites(self, task: Task) -> list[Site]:
        arch, model = task.arch, task.model
        # A second quantizer after the first changes nothing until training separates their ranges.
        sums, read = set(_sums(arch)), {group.producer for group in arch.groups}
        groups = arch.groups
        if arch.post_norm:  # the output of its norms is the residual stream, rounded already
            groups = tuple(group for group in groups[1:] if group.producer not in arch.norms)
        sites = _linear_inputs(task, groups)
        sites.append(_input("embeddings", [task.blocks[0]]))
        for index, block in enumerate(task.blocks):
            name = f"{arch.blocks}.{index}"
            for group in arch.groups:
                for linear in group.linears:
                    sites.append(_output(f"{name}.{linear}", block.get_submodule(linear)))
            for norm in arch.norms:
                module = block.get_submodule(norm)
                if norm in sums:
                    sites.append(Site(f"{name}.{norm}.sum", _in_place(module), module))
                if norm not in read or arch.post_norm:
                    sites.append(_output(f"{name}.{norm}", module))
            for inner, module in block.named_modules():
                if _is_activation(module) and arch.gated:
                    sites.append(_output(f"{name}.{inner}", module))
            if not arch.post_norm:  # there the last norm's output is the block's
                sites.append(_output(name, block))
        if arch.norm is not None:
            sites.append(_output(arch.norm, model.get_submodule(arch.norm)))
        sites.append(_output(arch.head, model.get_submodule(arch.head)))
        return sites


def _sums(arch: Arch) -> tuple[str, ...]:
    """Norms that read a residual sum of the block which the next residual reads too.

    The first norm, and with a parallel residual every norm, reads the block's input instead.
    """
    if arch.post_norm:
        return arch.norms
    read = [group.producer for group in arch.groups if group.producer in arch.norms]
    return () if arch.parallel else tuple(str(norm) for norm in read[1:])


def _linear_inputs(task: Task, groups: tuple[Group, ...]) -> list[Site]:
    sites = []
    for index, block in enumerate(task.blocks):
        for group in groups:
            members = [block.get_submodule(linear) for linear in group.linears]
            sites.append(_input(input_name(task.arch, index, group), members))
    return sites


def input_name(arch: Arch, block: int, group: Group) -> str:
    """The site of what the linears of a group read."""
    return f"{arch.blocks}.{block}.{group.linears[0]}.input"


def _put(sites: list[Site], make: Make) -> dict[str, nn.Module]:
    made = {}
    for site in sites:
        made[site.name] = make()
        site.put(made[site.name])
    return made


def _input(name: str, modules: list[nn.Module]) -> Site:
    """modules: in execution order."""

    def put(quantizer: nn.Module) -> None:
        site_input(modules).quantizer = quantizer

    return Site(name, put, modules[0], readers=tuple(modules))


def _in_place(module: nn.Module) -> Callable[[nn.Module], None]:
    def put(quantizer: nn.Module) -> None:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            args[0].copy_(quantizer(args[0].clone()))  # backward needs the unrounded value

        module.register_forward_pre_hook(hook)

    return put


def _output(name: str, module: nn.Module) -> Site:
    def put(quantizer: nn.Module) -> None:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (quantizer(output[0]), *output[1:])
            return quantizer(output)

        module.register_forward_hook(hook)

    return Site(f"{name}.output", put, module, leaves=True)


def _is_activation(module: nn.Module) -> bool:
    """An activation function: a leaf without parameters that is neither dropout nor identity."""
    return (
        not any(True for _ in module.children())
        and not any(True for _ in module.parameters())
        and not any(True for _ in module.buffers())
        and not isinstance(module, nn.Dropout | nn.Identity)
    )
