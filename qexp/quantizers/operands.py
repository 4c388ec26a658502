"""Quantizers on the operands of every block's attention, and their names."""

from collections.abc import Callable, Iterator

from torch import nn

from qexp.arch import Arch
from qexp.quantizers.attention import Inside, install
from qexp.quantizers.window import Window
from qexp.task import Task


def operand_name(arch: Arch, block: int, operand: str) -> str:
    """The site of an operand of a block's attention."""
    return f"{arch.blocks}.{block}.attention.{operand}"


def operand_names(task: Task, operands: tuple[str, ...]) -> list[str]:
    """The sites of these operands of every block's attention."""
    blocks = range(len(task.blocks))
    return [operand_name(task.arch, n, operand) for n in blocks for operand in operands]


def attention_modules(task: Task, block: int) -> Iterator[nn.Module]:
    """Modules among which is the one that computes the attention of a block."""
    writer = task.arch.writers[0]  # the attention module owns the first writer
    path = writer.rpartition(".")[0]
    # BERT's output projection is a sibling of the attention: take all modules below both.
    yield from task.blocks[block].get_submodule(path.partition(".")[0]).modules()


def inside(
    task: Task,
    make: Callable[[str], nn.Module],
    operands: tuple[str, ...],
    window: Window | None = None,
) -> dict[str, nn.Module]:
    """Put a quantizer on these operands of every block's attention; the quantizers by site."""
    made: dict[str, nn.Module] = {}
    found = {}
    if not operands:
        return made
    for index in range(len(task.blocks)):
        own = {operand: make(operand) for operand in operands}
        for module in attention_modules(task, index):
            found[module] = Inside(own, window=window)
        made |= {operand_name(task.arch, index, key): q for key, q in own.items()}
    install(task.model, found)
    return made
