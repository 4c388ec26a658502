"""Capture and replay of the calls that the blocks of a model receive."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from qexp.task import Batch, Task


class Call(NamedTuple):
    """The arguments of one block except the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Chunk:
    """Sequences that run together: their batch, the current block's input, each block's call."""

    batch: Batch
    hidden: Tensor
    calls: list[Call]


def split(batch: Batch, chunk: int) -> list[Batch]:
    return [
        {key: value[start : start + chunk] for key, value in batch.items()}
        for start in range(0, rows(batch), chunk)
    ]


def divided(batches: Sequence[Batch], rank: int, count: int) -> list[Batch]:
    """The sequences of one of `count` processes: whole batches where there are at least as many as
    processes, so that each is computed as it would be in one process; else parts of them."""
    if len(batches) >= count:
        return list(batches[len(batches) * rank // count : len(batches) * (rank + 1) // count])
    total = sum(map(rows, batches))
    start, stop = total * rank // count, total * (rank + 1) // count
    own, before = [], 0
    for batch in batches:
        part = slice(max(start - before, 0), max(stop - before, 0))
        own.append({key: value[part] for key, value in batch.items()})
        before += rows(batch)
    return [batch for batch in own if rows(batch)]


def rows(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def capture_calls(task: Task, batch: Batch, returns_tuple: bool) -> Chunk:
    entry: list[Tensor] = []
    calls: list[Call] = []
    # Ahead of the quantizer of the first block's input, which each run of the block meets.
    handle = task.blocks[0].register_forward_pre_hook(
        lambda _, args: entry.append(args[0]), prepend=True
    )
    try:
        with bypass_blocks(task.blocks, returns_tuple, calls):
            task.encode(batch)
    finally:
        handle.remove()
    hidden = entry[0].to(next(task.blocks[0].parameters()).device)
    return Chunk(batch, hidden, calls)


class Enough(Exception):
    """Ends a forward pass that has shown what it was run for."""


def returns_tuple(task: Task, batch: Batch) -> bool:
    """Whether the blocks of this family return a tuple; transformers has both kinds."""
    kinds: list[bool] = []

    def look(_: nn.Module, __: Any, output: Any) -> None:
        kinds.append(isinstance(output, tuple))
        raise Enough

    handle = task.blocks[0].register_forward_hook(look)
    with suppress(Enough):
        task.encode({key: value[:1] for key, value in batch.items()})
    handle.remove()
    return kinds[0]


@contextmanager
def bypass_blocks(
    blocks: Iterable[nn.Module],
    returns_tuple: bool,
    seen: list[Call] | None = None,
) -> Iterator[None]:
    """Within the context, blocks return their input unchanged; `seen` collects their arguments."""

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        if seen is not None:
            seen.append(Call(args, kwargs))
        return (hidden,) if returns_tuple else hidden

    for block in blocks:
        block.forward = forward
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # uncovers the method of the class


@contextmanager
def replace_input(block: nn.Module, hidden: Tensor) -> Iterator[None]:
    """Within the context, the block, and a quantizer of its input, read `hidden` as the input."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return (hidden.to(args[0].device), *args[1:]), kwargs

    handle = block.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
