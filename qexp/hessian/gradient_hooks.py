"""Hooks that collect the inputs of layers with the gradients at their outputs; lost gradients."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jaxtyping import Bool, Float
from torch import Tensor, nn

from qexp.common.errors import UserError

# (name of a linear, its inputs, the gradients at its outputs)
OnGradient = Callable[[str, Tensor, Tensor], None]


@contextmanager
def watching(linears: dict[str, nn.Module], take: OnGradient) -> Iterator[None]:
    """Within the context, the backward pass calls `take(name, inputs, output gradients)`."""
    handles = []
    for name, linear in linears.items():

        def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor, name: str = name) -> None:
            x = args[0].detach()
            out.register_hook(lambda g: take(name, x, g))

        handles.append(linear.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_dead(
    name: str,
    diagonal: Float[Tensor, " columns"],
    seen: Bool[Tensor, " columns"],
    scored: Bool[Tensor, " columns"],
) -> None:
    """Check that only inputs without data have a zero diagonal: solvers set their weights to 0.

    An input that only a sequence's last token uses has data and rightly no gradient, as nothing is
    predicted there; it gets the least diagonal of the others. UserError for an underflow.
    """
    dead = diagonal == 0
    if (lost := int((dead & scored).sum())) > 0:
        raise UserError(
            f"{name}: {lost} inputs with data have no gradient: it underflowed; raise "
            "method.hessian.loss_scale or take method.hessian.dtype=float32."
        )
    if not dead.all():
        diagonal[dead & seen] = diagonal[~dead].min()
