"""Quantizers on the operands of every block's attention, and their names."""

from collections.abc import Callable

from torch import nn

from qexp.quantizers.attention import Inside, install
from qexp.quantizers.window import Window
from qexp.task import Task


def operand_names(task: Task, operands: tuple[str, ...]) -> list[str]:
    """The names of these operands of every block's attention."""
    return [_operand(task, n, key) for n in range(len(task.blocks)) for key in operands]


def _operand(task: Task, block: int, operand: str) -> str:
    return f"{task.arch.blocks}.{block}.attention.{operand}"


def inside(
    task: Task,
    make: Callable[[str], nn.Module],
    operands: tuple[str, ...],
    window: Window | None = None,
) -> dict[str, nn.Module]:
    """Put a quantizer on these operands of every block's attention; the quantizers by name."""
    made: dict[str, nn.Module] = {}
    found = {}
    if not operands:
        return made
    for index, block in enumerate(task.blocks):
        writer = task.arch.writers[0]  # the attention module owns the first writer
        path = writer.rpartition(".")[0]
        own = {operand: make(operand) for operand in operands}
        # BERT's output projection is a sibling of the attention: take all modules below both.
        for module in block.get_submodule(path.partition(".")[0]).modules():
            found[module] = Inside(own, window)
        made |= {_operand(task, index, key): q for key, q in own.items()}
    install(task.model, found)
    return made
