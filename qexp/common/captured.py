"""Functions of tensors that a CUDA device may record once per shape and replay as one graph."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

DEVICES = {"cuda": "cudagraphs"}  # type of device → backend of torch.compile; same kernels
_wanted = False


def replay(wanted: bool) -> None:
    """Set whether captured functions of this process are replayed, where the device can."""
    global _wanted
    _wanted = wanted


def captured(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """`function`, replayed as one graph if `replay` says so and the device of its first argument
    is one of DEVICES.

    It must change no argument and read no number on the host. Its results are overwritten by the
    next call. Tracing takes seconds for each combination of shapes.
    """
    compiled: dict[str, Callable[Arguments, Result]] = {}

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        first = args[0]
        assert isinstance(first, torch.Tensor)
        backend = DEVICES.get(first.device.type) if _wanted else None
        if backend is None:
            return function(*args, **kwargs)
        if backend not in compiled:
            compiled[backend] = torch.compile(
                function, backend=backend, fullgraph=True, dynamic=False
            )
        torch.compiler.cudagraph_mark_step_begin()
        return compiled[backend](*args, **kwargs)

    return call
