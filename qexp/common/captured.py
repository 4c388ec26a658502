"""Functions of tensors that a CUDA device may record once per shape and replay as one graph."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

# Type of device → backend of torch.compile. This one launches the same kernels.
DEVICES: dict[str, Any] = {"cuda": "cudagraphs"}
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
        kind = first.device.type
        if not _wanted or kind not in DEVICES:
            return function(*args, **kwargs)
        if kind not in compiled:
            backend = DEVICES[kind]
            compiled[kind] = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)
        torch.compiler.cudagraph_mark_step_begin()
        return compiled[kind](*args, **kwargs)

    return call
