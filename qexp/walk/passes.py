"""Forward passes that wait inside a block: greenlets, all in one thread."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import nn

from qexp.walk.capture import Enough


class Pass:
    """A forward pass that stops in front of each `waiting` module.

    forward: a lambda. No function of this package may be unfinished in a pass that waits: checks of
    shapes keep a stack of the functions that run, in the order of one thread, and leave only
    lambdas alone.
    """

    def __init__(self, forward: Callable[[], Any]) -> None:
        self._greenlet = greenlet(lambda _: forward())
        self._greenlet.gr_context = copy_context()

    def resume(self) -> Any:
        """Run on, without gradients, and return what the next waiting module reads, or the result
        of `forward`."""
        with torch.no_grad():
            return self._greenlet.switch(None)

    def end(self) -> None:
        """End the pass where it waits. Hooks that are always called are called."""
        if self._greenlet:
            with suppress(Enough):
                self._greenlet.throw(Enough)


@contextmanager
def waiting(module: nn.Module) -> Iterator[None]:
    """Within the context, a `Pass` hands over what `module` reads, and waits."""
    handle = module.register_forward_pre_hook(
        lambda _, args: parent.switch(args[0]) if (parent := getcurrent().parent) else None
    )
    try:
        yield
    finally:
        handle.remove()
