"""Quantize transformer models by configuration: one command, one folder, one comparable number.

The Python interface is `run`, `sweep`, `load` and `runs`, see `qexp.api`. They are imported when
they are first used, so that `import qexp` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qexp.api import Run, UserError, load, run, runs, sweep

__all__ = ["Run", "UserError", "load", "run", "runs", "sweep"]
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    if name == "runs":
        return import_module("qexp.runs")  # a package of this name exists, and can be called
    if name in __all__:
        return getattr(import_module("qexp.api"), name)
    raise AttributeError(f"module 'qexp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
