"""Second moments of the inputs of a block's linears, summed while it runs."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from qexp.arch import Group
from qexp.hessian.layerwise import add_symmetric
from qexp.walk import Block

# Σ x xᵀ of inputs, on and above the diagonal, by the first linear of each group
InputMoments = dict[nn.Module, Tensor]


@contextmanager
def input_moments(block: Block, groups: Iterable[Group]) -> Iterator[InputMoments]:
    """Within the context, sums Σ x xᵀ on and above the diagonal over the inputs of `groups`; after
    it, the sums are over the whole walk."""
    found: InputMoments = {}

    def hook(linear: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().flatten(0, -2).float()
        if linear not in found:
            found[linear] = x.new_zeros(x.shape[1], x.shape[1])
        add_symmetric(found[linear], x, x)

    first = [block.module.get_submodule(group.linears[0]) for group in groups]
    handles = [linear.register_forward_pre_hook(hook) for linear in first]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    for total in found.values():
        block.share.sum(total)
