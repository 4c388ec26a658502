"""Hessians handed out with the moments of a group's inputs in the quantized and the float model."""

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.common.collectives import WHOLE, Share
from qexp.hessian.base import ForEachGroup, Hessian, OnHessian, collected
from qexp.hessian.float_stream import FloatInputs, FloatStream
from qexp.hessian.layerwise import second_moment
from qexp.solvers.base import Moments
from qexp.walk import Block


class Paired:
    """Visits the groups of a block in order, each after the groups before it were rounded, with its
    inputs in both models.

    hessian: measured for the whole block before its first group is rounded, unless it is the own
    moment of each group's inputs.
    """

    def __init__(self, hessian: Hessian) -> None:
        self.hessian = hessian
        self._stream = FloatStream()
        self._floats: FloatInputs = {}

    def observe(self, block: Block) -> None:
        """Run the float model to the end of a block; for each in order, before it changes."""
        self._floats = self._stream.inputs(block)

    def prepare(self, first: Block) -> ForEachGroup:
        """As `Hessian.prepare`; each block must have been observed."""
        measure = self.hessian.prepare(first)

        def for_each_group(block: Block, on_hessian: OnHessian) -> None:
            measured = {} if self.hessian.is_own_moment else collected(measure, block)

            def on_inputs(names: tuple[str, ...], inputs: Iterator[Tensor]) -> None:
                moments = moments_of(inputs, self._floats.pop(names), block.share)
                for members in _sharing(names, measured):
                    on_hessian(members, measured.get(members[0], moments.own), moments)

            block.advance(on_inputs)

        return for_each_group


def moments_of(
    inputs: Iterable[Float[Tensor, "..."]],
    floats: Iterable[Float[Tensor, "..."]],
    share: Share = WHOLE,
) -> Moments:
    """Both moments over chunks [..., columns] of equal tokens, accumulated in float32. share: of
    all tokens that the chunks have."""
    kept = [chunk.detach().reshape(-1, chunk.shape[-1]) for chunk in inputs]
    cross = torch.zeros(kept[0].shape[1], kept[0].shape[1], device=kept[0].device)
    for own, other in zip(kept, floats, strict=True):
        x = other.detach().reshape(-1, other.shape[-1]).to(own.device).float()
        cross.addmm_(x.T, own.float())
    tokens = sum(share.gathered(sum(map(len, kept))))
    return Moments(second_moment(kept, share), share.sum(cross).mul_(2 / tokens))


def _sharing(names: tuple[str, ...], measured: dict[str, Tensor]) -> list[tuple[str, ...]]:
    """Names with one Hessian together."""
    groups: dict[int, list[str]] = {}
    for name in names:
        groups.setdefault(id(measured.get(name)), []).append(name)
    return [tuple(group) for group in groups.values()]
