"""Progress bars on standard error, with a switch for the whole process."""

import os
import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm
from transformers.utils import logging

Item = TypeVar("Item")


def show(wanted: bool) -> None:
    """Set whether this process draws bars; this also disables those of transformers."""
    os.environ["QEXP_PROGRESS"] = str(int(wanted))
    if not drawn():
        logging.disable_progress_bar()


def drawn() -> bool:
    """Whether bars are drawn: only on a terminal, and not with QEXP_PROGRESS=0, which `show(False)`
    sets."""
    return os.environ.get("QEXP_PROGRESS") != "0" and sys.stderr.isatty()


def bar(items: Iterable[Item], description: str, total: int | None = None) -> Iterable[Item]:
    """`items` with a progress bar, which is removed at the end."""
    return tqdm(items, desc=description, total=total, disable=not drawn(), leave=False)
