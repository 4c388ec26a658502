"""Activations inside a block: how many sequences run at a time, and whether all can wait in it."""

from collections.abc import Sequence

import psutil
import torch

from qexp.common import ranks
from qexp.task import Batch, Task
from qexp.walk.capture import rows

# Bytes of activations inside a block that a chunk may have. Larger products are not faster on a
# CPU, and a fixed number gives the same sums on machines with more or less memory.
INSIDE = 64 * 2**20


def inside(tokens: int, widest: int, hidden: int) -> int:
    """Numbers that are in memory while tokens run through a block: the widest result three times
    (gate, up, product), the stream and what attention holds."""
    return tokens * (3 * widest + 6 * hidden)


def suspended(tokens: int, widest: int, hidden: int) -> int:
    """Numbers that tokens hold while their forward pass waits inside a block: its input, the stream
    after attention, the normalized stream and the input of the last linear."""
    return tokens * (widest + 3 * hidden)


def sequences(length: int, widest: int, hidden: int, itemsize: int, room: int = INSIDE) -> int:
    """Sequences of `length` tokens whose activations take `room` bytes, at least one. A power of
    two, so that chunks are equal and are divided evenly where fewer sequences run together."""
    found = max(room // (inside(length, widest, hidden) * itemsize), 1)
    return 1 << (found.bit_length() - 1)


def at_once(task: Task, batch: Batch) -> int:
    """Sequences of a chunk: `INSIDE` bytes, or half of the free memory where that is less."""
    room = min(INSIDE, free(task.device) // 2)
    found = sequences(_tokens(task, batch), *_widths(task), _itemsize(task), room)
    return min(found, rows(batch))


def can_wait(task: Task, batches: Sequence[Batch]) -> bool:
    """Whether half of the free memory holds all sequences while they wait inside a block."""
    tokens = sum(_tokens(task, batch) * rows(batch) for batch in batches)
    return suspended(tokens, *_widths(task)) * _itemsize(task) <= free(task.device) / 2


def free(device: torch.device) -> int:
    """Bytes, of this process's share."""
    query = getattr(torch.get_device_module(device), "mem_get_info", None)
    if query is not None:
        return query(device)[0]
    return psutil.virtual_memory().available // (ranks.world() // ranks.nodes())


def _widths(task: Task) -> tuple[int, int]:
    widths = [linear.out_features for linear in task.linears().values()]
    return max(widths), task.model.config.hidden_size


def _itemsize(task: Task) -> int:
    return max(next(task.parameters()).element_size(), 2)


def _tokens(task: Task, batch: Batch) -> int:
    """Of one sequence."""
    if "input_ids" in batch:
        return batch["input_ids"].shape[1]
    config = task.model.config
    return (config.image_size // config.patch_size) ** 2 + 1
