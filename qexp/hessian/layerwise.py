"""The Hessian of a layer's own output: the second moment of its inputs."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.common.collectives import WHOLE, Share
from qexp.common.errors import check_number
from qexp.hessian.base import CacheableHessian, ForEachGroup, Measured, OnHessian
from qexp.walk import Block
from qexp.walk.blocks import OnInputs

# Columns per strip of the triangle that `add_symmetric` computes.
STRIP = 192


def add_symmetric(
    total: Float[Tensor, "columns columns"],
    a: Float[Tensor, "rows columns"],
    b: Float[Tensor, "rows columns"],
) -> None:
    """Add aᵀ b, known to be symmetric, to the part of `total` on and above the diagonal.

    Only strips of that part are multiplied, which saves nearly half of the work.
    """
    for start in range(0, a.shape[1], STRIP):
        stop = min(start + STRIP, a.shape[1])
        total[start:stop, start:].addmm_(a[:, start:stop].T, b[:, start:])


def mirrored(total: Float[Tensor, "columns columns"]) -> Float[Tensor, "columns columns"]:
    """The symmetric matrix whose upper triangle `add_symmetric` computed, in place: Hessians are
    the largest matrices of a run."""
    for start in range(0, len(total), STRIP):
        here, later = slice(start, start + STRIP), slice(start + STRIP, None)
        total[here, here] = total[here, here].triu() + total[here, here].triu(1).T
        total[later, here] = total[here, later].T
    return total


def second_moment(
    chunks: Iterable[Float[Tensor, "..."]], share: Share = WHOLE
) -> Float[Tensor, "columns columns"]:
    """2/N Σ x xᵀ over the N rows of all chunks [..., columns], accumulated in float32.

    share: of all rows that the chunks have.
    """
    count, total = 0, torch.empty(0, 0)
    for chunk in chunks:
        x = chunk.detach().reshape(-1, chunk.shape[-1]).float()
        if not count:
            total = torch.zeros(x.shape[1], x.shape[1], device=x.device)
        add_symmetric(total, x, x)
        count += len(x)
    rows = sum(share.gathered(count))
    return mirrored(share.sum(total)).mul_(2 / max(rows, 1))


@dataclass(frozen=True)
class Layerwise(CacheableHessian):
    """2/N Σ x xᵀ over the tokens that reach the layer: the squared error of its output (OBQ, GPTQ).

    sequential: a group's Hessian is taken after the groups before it were rounded ("true
    sequential"); otherwise all of a block's at the block's float weights.
    """

    sequential: bool = True
    memory: float = 8.0

    def __post_init__(self) -> None:
        check_number("method.hessian", self, memory=0)

    @property
    def blocks_per_pass(self) -> int:
        return 1

    @property
    def is_own_moment(self) -> bool:
        return self.sequential

    def prepare(self, first: Block) -> ForEachGroup:
        return self._for_each_group

    def _for_each_group(self, block: Block, on_hessian: OnHessian) -> None:
        if self.sequential:
            block.advance(
                lambda names, inputs: on_hessian(names, second_moment(inputs, block.share), None)
            )
            return
        found: list[tuple[tuple[str, ...], Tensor]] = []
        block.observe(
            lambda names, inputs: found.append((names, second_moment(inputs, block.share)))
        )
        for names, hessian in found:
            on_hessian(names, hessian, None)

    def measure(self, first: Block, wanted: Collection[int]) -> Iterator[Measured]:
        for block in first.onward():
            if block.index in wanted:
                found: dict[str, Tensor] = {}
                block.advance(_keeping(found, block.share))
                yield block.index, found
            if block.index == max(wanted):
                return

    def identity(self, first: Block) -> dict[str, Any]:
        pieces = first.share.gathered([len(hidden) for hidden in first.inputs])
        return {"pieces": pieces if first.share.divided else pieces[0]}  # the order of summation


def _keeping(found: dict[str, Tensor], share: Share) -> OnInputs:
    def on_inputs(names: tuple[str, ...], inputs: Iterator[Tensor]) -> None:
        found[" ".join(names)] = second_moment(inputs, share)

    return on_inputs
