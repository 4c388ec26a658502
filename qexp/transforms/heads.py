"""Matrices on the value heads of attention, folded into the projections."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.common.on_disk import assign
from qexp.quantizers.maps import attention_group
from qexp.quantizers.online import OnlineMap, hadamard_factors
from qexp.task import Task


def head_shape(task: Task, block: int) -> tuple[int, int]:
    """The number of query heads and the width of each."""
    output = task.blocks[block].get_parameter(f"{task.arch.writers[0]}.weight")
    heads = int(task.model.config.get_text_config().num_attention_heads)
    return heads, output.shape[1] // heads


def value_rotation(size: int, generator: torch.Generator) -> Float[Tensor, "size size"]:
    """A Hadamard matrix, or where none is known one that is partly random; float64."""
    made = OnlineMap(hadamard_factors(size, generator))
    return made(torch.eye(size, dtype=torch.float64)).T


def turn_values(task: Task, block: int, q: Float[Tensor, "*heads size size"]) -> None:
    """Multiply each value head by the matrix, or by its own, and undo it after attention. Nothing
    where one linear makes values and queries."""
    group, module = attention_group(task), task.blocks[block]
    if group.producer is None:
        return
    for parameter in module.get_submodule(group.producer).parameters():
        assign(parameter, turned_rows(lambda: q, parameter.data.to(q)))
    weight = module.get_parameter(f"{group.linears[0]}.weight")
    dual = q.inverse().transpose(-1, -2)
    assign(weight, turned_columns(lambda: dual, weight.data.to(q)))


def turned_rows(matrix: Callable[[], Tensor], value: Tensor) -> Tensor:
    """Each block of rows, or of entries of a bias, as large as the matrix, times it, or each times
    its own."""
    q = matrix()
    size = q.shape[-1]
    return (q @ value.reshape(len(value) // size, size, -1)).reshape(value.shape)


def turned_columns(matrix: Callable[[], Tensor], weight: Tensor) -> Tensor:
    """Each row's blocks of entries as large as the matrix, times it; of several matrices, each for
    as many blocks as share it."""
    q = matrix()
    blocks = weight.reshape(len(weight), -1, q.shape[-1]).transpose(0, 1)
    if q.ndim == 3:
        q = q.repeat_interleave(len(blocks) // len(q), 0)
    return (blocks @ q.transpose(-1, -2)).transpose(0, 1).reshape(weight.shape)
