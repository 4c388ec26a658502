"""Online maps on a model: put on its sites, folded into its weights, reinstalled from a file."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from qexp.arch import Group
from qexp.common.errors import UserError
from qexp.common.on_disk import assign
from qexp.quantizers.attention import Inside, install
from qexp.quantizers.online import OnlineMap, restored
from qexp.quantizers.operands import attention_modules, operand_name
from qexp.quantizers.placement import input_name
from qexp.quantizers.site_input import SiteInput, site_input
from qexp.task import Task


def attention_group(task: Task) -> Group:
    """The group that reads the heads side by side."""
    writer = task.arch.writers[0]
    return next(group for group in task.arch.groups if group.linears[0] == writer)


def shared_input(task: Task, block: int, group: Group) -> SiteInput:
    """What the linears of a group of this block read."""
    module = task.blocks[block]
    return site_input([module.get_submodule(name) for name in group.linears])


@torch.no_grad()
def map_inputs(task: Task, block: int, group: Group, made: OnlineMap) -> None:
    """Map what the linears of a group read, and fold the inverse into their weights. UserError
    where the tensor has a map already."""
    refuse_mapped(task, block, group)
    for name in group.linears:
        weight = task.blocks[block].get_parameter(f"{name}.weight")
        assign(weight, made.undo_rows(weight.data))
    _put(task, input_name(task.arch, block, group), made)


def map_keys(task: Task, block: int, made: OnlineMap) -> None:
    """Map each head's vector of the keys, after a rotary embedding, and by the inverse transpose
    those of the queries: attention scores stay what they are."""
    if (name := operand_name(task.arch, block, "key")).replace(".", "/") in task.maps:
        raise UserError(f"transform: {name} has an online map already; give one of the two")
    _put(task, name, made)


def refuse_mapped(task: Task, block: int, group: Group) -> None:
    """UserError where an online map lies between the linears of a group and what they read: nothing
    can be moved through it."""
    if input_name(task.arch, block, group).replace(".", "/") in task.maps:
        raise UserError(
            f"transform: an online map lies before {group.linears[0]} of block {block}, through "
            "which no other change can be moved; put it last, transform=[smooth,quarot]"
        )


def bits(task: Task) -> int:
    """Stored bits of all maps."""
    return sum(made.bits() for made in _maps(task).values())


def layout(task: Task) -> dict[str, Any]:
    """JSON values from which `reinstall` builds the maps, their matrices aside."""
    return {name: made.described() for name, made in _maps(task).items()}


def stored(task: Task) -> dict[str, Tensor]:
    """The matrices of all maps by site and factor."""
    return {
        f"{name}.{key}": matrix
        for name, made in _maps(task).items()
        for key, matrix in made.stored().items()
    }


def reinstall(task: Task, described: Mapping[str, Any], matrices: Mapping[str, Tensor]) -> None:
    """Put maps on a model whose weights hold their inverses. UserError where a file lacks one."""
    sites = dict(_sites(task))
    for name, parts in described.items():
        if name not in sites:
            raise UserError(f"the weights file has an online map for {name}, which no site is")
        own = {
            key.removeprefix(f"{name}."): matrix
            for key, matrix in matrices.items()
            if key.startswith(f"{name}.")
        }
        _put(task, name, restored(parts, own))


def _maps(task: Task) -> dict[str, OnlineMap]:
    found = {}
    for name, made in task.maps.items():
        assert isinstance(made, OnlineMap)
        found[name.replace("/", ".")] = made
    return found


def _sites(task: Task) -> Iterator[tuple[str, tuple[int, Group | None]]]:
    """Of each tensor that can be mapped its block and the group that reads it, None for keys."""
    for block in range(len(task.blocks)):
        for group in task.arch.groups:
            yield input_name(task.arch, block, group), (block, group)
        yield operand_name(task.arch, block, "key"), (block, None)


def _put(task: Task, name: str, made: OnlineMap) -> None:
    block, group = dict(_sites(task))[name]
    made = made.to(task.device)
    task.maps[name.replace(".", "/")] = made
    if group is not None:
        shared_input(task, block, group).map = made
        return
    dual = made.dual().to(task.device)
    maps = {"query": dual, "key": made}
    install(task.model, {m: Inside({}, dict(maps)) for m in attention_modules(task, block)})
