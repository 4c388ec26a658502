"""The activations of the float model along a walk whose blocks are quantized."""

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from qexp.quantizers.scheme import float_activations
from qexp.walk import Block

# By the names of the linears that share an input: that input of the float model, one per chunk.
FloatInputs = dict[tuple[str, ...], list[Tensor]]


class FloatStream:
    """Runs each block on what the float blocks before it give, before the caller changes it."""

    def __init__(self) -> None:
        self._hidden: list[Tensor] | None = None

    def inputs(self, block: Block) -> FloatInputs:
        """The float inputs of a block that is still float; to be called once for every block, in
        order. Activation quantizers do not round meanwhile."""
        hidden = block.inputs if self._hidden is None else self._hidden
        pairs = zip(block.chunks, hidden, strict=True)
        twin = replace(block, chunks=[replace(c, hidden=h) for c, h in pairs], _settled=None)
        found: FloatInputs = {}

        def keep(names: tuple[str, ...], inputs: Iterator[Tensor]) -> None:
            found[names] = list(inputs)

        with float_activations(block.task):
            twin.advance(keep)
        self._hidden = twin.settled
        return found
