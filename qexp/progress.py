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
    if not wanted or not sys.stderr.isatty():
        logging.disable_progress_bar()


def bar(items: Iterable[Item], description: str, total: int | None = None) -> Iterable[Item]:
    """`items`, with a bar on standard error while they last.

    No bar where QEXP_PROGRESS=0 (which `show(False)` sets) or standard error is not a terminal.
    """
    quiet = True if os.environ.get("QEXP_PROGRESS") == "0" else None  # None: tqdm asks the terminal
    return tqdm(items, desc=description, total=total, disable=quiet, leave=False)
