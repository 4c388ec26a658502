"""Functions on tensors that a CUDA device may record once per shape and replay as one graph."""

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec

import torch

Arguments = ParamSpec("Arguments")
Written = tuple[torch.Tensor, ...]

# Type of device → backend of torch.compile. This one launches the same kernels.
DEVICES: dict[str, Any] = {"cuda": "cudagraphs"}
_wanted = False


def replay(wanted: bool) -> None:
    """Set whether captured functions of this process are replayed, where the device can."""
    global _wanted
    _wanted = wanted


def captured(function: Callable[Concatenate[Written, Arguments], None]) -> Any:
    """`function`, replayed as one graph if `replay` says so and the device of the tensors that it
    writes, its first argument, is one of DEVICES.

    It must write no other tensor and read no number on the host. Tracing takes seconds for each
    combination of shapes.
    """
    compiled: dict[str, Callable[..., Written]] = {}

    def pure(written: Written, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Written:
        copies = tuple(tensor.clone() for tensor in written)
        function(copies, *args, **kwargs)
        return copies

    @wraps(function)
    def call(written: Written, *args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        kind = written[0].device.type
        if not _wanted or kind not in DEVICES:
            function(written, *args, **kwargs)
            return
        if kind not in compiled:
            backend = DEVICES[kind]
            compiled[kind] = torch.compile(pure, backend=backend, fullgraph=True, dynamic=False)
        torch.compiler.cudagraph_mark_step_begin()
        for tensor, result in zip(written, compiled[kind](written, *args, **kwargs), strict=True):
            tensor.copy_(result)  # before the next replay overwrites it

    return call
