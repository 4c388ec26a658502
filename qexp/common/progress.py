"""Progress bars on standard error, with a switch for the whole process."""

import os
import sys
from collections.abc import Iterable
from functools import partialmethod
from typing import TypeVar

from lightning.pytorch.callbacks import TQDMProgressBar
from tqdm import auto, tqdm
from transformers.utils import logging

Item = TypeVar("Item")

LIBRARIES = auto.tqdm.__init__  # the class that transformers, datasets and the hub's client use


def show(wanted: bool) -> None:
    """Set whether this process draws bars, those of other libraries included."""
    os.environ["QEXP_PROGRESS"] = str(int(wanted))
    # transformers' own switch misses the bar of its GGUF reader.
    quiet = partialmethod(LIBRARIES, disable=True)
    auto.tqdm.__init__ = LIBRARIES if drawn() else quiet
    if not drawn():
        logging.disable_progress_bar()


def drawn() -> bool:
    """Whether bars are drawn: only on a terminal, and not with QEXP_PROGRESS=0, which `show(False)`
    sets."""
    return os.environ.get("QEXP_PROGRESS") != "0" and sys.stderr.isatty()


def bar(items: Iterable[Item], description: str, total: int | None = None) -> Iterable[Item]:
    """`items` with a progress bar, which is removed at the end."""
    return tqdm(items, desc=description, total=total, disable=not drawn(), leave=False)


class Bar(TQDMProgressBar):
    """Lightning's bar of a test loop, with a description."""

    def __init__(self, description: str) -> None:
        super().__init__()
        self.description = description

    @property
    def test_description(self) -> str:
        return self.description
