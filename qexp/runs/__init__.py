"""Run folders: their names, the files in them, and reading them again.

The package can be called: `qexp.runs("outputs")` is `qexp.api.runs`, a table of finished runs.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """A module that is also the function of the same name in the Python interface."""

    def __call__(self, *folders: Any, **options: Any) -> Any:
        return import_module("qexp.api").runs(*folders, **options)


sys.modules[__name__].__class__ = _Callable
