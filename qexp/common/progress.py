"""Progress bars that a config key, an environment variable or a log file can silence."""

import os
import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm
from transformers.utils import logging

Item = TypeVar("Item")


def show(wanted: bool) -> None:
    """Whether this process draws bars; those of transformers follow."""
    os.environ["QEXP_PROGRESS"] = str(int(wanted))
    if not drawn():
        logging.disable_progress_bar()


def drawn() -> bool:
    """Whether bars are drawn: not if QEXP_PROGRESS=0 (which `show(False)` sets), nor where standard
    error is not a terminal."""
    return os.environ.get("QEXP_PROGRESS") != "0" and sys.stderr.isatty()


def bar(items: Iterable[Item], description: str, total: int | None = None) -> Iterable[Item]:
    """`items`, with a bar on standard error while they last."""
    return tqdm(items, desc=description, total=total, disable=not drawn(), leave=False)
