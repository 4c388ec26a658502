"""In which loss a rounding error counts: Hessians of the layers of a block.

Scale is free everywhere: solvers give the same result for H and c·H.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.walk import Block

# Called with linears that have one Hessian in common, and that Hessian.
Solve = Callable[[tuple[str, ...], Float[Tensor, "columns columns"]], None]

# Columns per strip of the triangle that `add_symmetric` computes.
STRIP = 192


class Hessian(ABC):
    @property
    @abstractmethod
    def span(self) -> int:
        """How many blocks are measured together: work can be taken up again at multiples of it."""

    def prepare(self, first: Block) -> None:  # noqa: B027
        """Measure what must be measured at float weights: called once, with the first block, before
        anything is rounded (also by a run that goes on where another was killed)."""

    @abstractmethod
    def each(self, block: Block, solve: Solve) -> None:
        """Hand every linear of the block to `solve`, once, with its Hessian as soon as that is
        known. May leave the block advanced (see `Block.advance`)."""

    def __call__(self, block: Block) -> dict[str, Float[Tensor, "_ _"]]:
        """The Hessian of each linear at the block's weights as they stand."""
        if block.index == 0:
            self.prepare(block)
        found: dict[str, Tensor] = {}

        def keep(names: tuple[str, ...], hessian: Tensor) -> None:
            found.update(dict.fromkeys(names, hessian))

        self.each(block, keep)
        block.left = None  # nothing was settled: the caller has yet to change the block
        return found


def add_symmetric(
    total: Float[Tensor, "columns columns"],
    a: Float[Tensor, "rows columns"],
    b: Float[Tensor, "rows columns"],
) -> None:
    """Add aᵀ b, known to be symmetric, to the part of `total` on and above the diagonal.

    Only strips there are multiplied, which saves nearly half the work.
    """
    for start in range(0, a.shape[1], STRIP):
        stop = min(start + STRIP, a.shape[1])
        total[start:stop, start:].addmm_(a[:, start:stop].T, b[:, start:])


def mirrored(total: Float[Tensor, "columns columns"]) -> Float[Tensor, "columns columns"]:
    """The whole matrix, from what `add_symmetric` left on and above the diagonal."""
    upper = total.triu()
    return upper + upper.triu(1).T


def second_moment(chunks: Iterable[Float[Tensor, "..."]]) -> Float[Tensor, "columns columns"]:
    """2/N Σ x xᵀ over the N rows of all chunks [..., columns], accumulated in float32."""
    count, total = 0, torch.empty(0, 0)
    for chunk in chunks:
        x = chunk.detach().reshape(-1, chunk.shape[-1]).float()
        if not count:
            total = torch.zeros(x.shape[1], x.shape[1], device=x.device)
        add_symmetric(total, x, x)
        count += len(x)
    return mirrored(total).mul_(2 / max(count, 1))


@dataclass(frozen=True)
class Layerwise(Hessian):
    """2/N Σ x xᵀ over the tokens that reach the layer: the squared error of its output (OBQ, GPTQ).

    sequential: a group's Hessian is taken after the groups before it were rounded ("true
    sequential"); otherwise all of a block's at the block's float weights.
    """

    sequential: bool = True

    @property
    def span(self) -> int:
        return 1

    def each(self, block: Block, solve: Solve) -> None:
        if self.sequential:
            block.advance(lambda names, inputs: solve(names, second_moment(inputs)))
            return
        found: list[tuple[tuple[str, ...], Tensor]] = []
        block.observe(lambda names, inputs: found.append((names, second_moment(inputs))))
        for names, hessian in found:
            solve(names, hessian)
