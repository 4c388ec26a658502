"""Text without private paths, for what is published of a run."""

import os
import re
from pathlib import Path
from typing import Any

from qexp.common.files import data_folder

# A path from the root or from a home folder: quoted, as in overrides with spaces, or unquoted. The
# slash of a/b, of https://a and of </s> does not begin one; that of file:///a does.
START = r"(?:(?<![\w.:/$}~<>\\-])|(?<=file://))"
PATH = re.compile(
    rf"(['\"])(?:~\w*)?/[^'\"\n]*\1|{START}(?:~\w*)?/(?:\\.|[^\s'\"=,:;()\[\]{{}}\\])+"
)
WHOLE = re.compile(r"(?:~\w*)?/[^\n]*")  # a value that is nothing but a path, spaces included


def portable(tree: Any) -> Any:
    """A JSON tree in which each absolute path is the path below the data folder or, where it is
    elsewhere, the name of the file or folder alone."""
    if isinstance(tree, dict):
        return {_text(str(key)): portable(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [portable(each) for each in tree]
    return _text(tree) if isinstance(tree, str) else tree


def place(path: str) -> str:
    """One path, as `portable` writes it."""
    full = Path(os.path.expanduser(path))
    if (data := data_folder()) is not None:
        for name, folder in ((full, data.absolute()), (full.resolve(), data.resolve())):
            if name.is_relative_to(folder):
                return name.relative_to(folder).as_posix()
    return full.name


def _text(text: str) -> str:
    if WHOLE.fullmatch(text):
        return place(text)
    key, equals, value = text.partition("=")
    if equals and WHOLE.fullmatch(value):  # an override, or an option of a command
        return f"{key}={place(value)}"
    return PATH.sub(_found, text)


def _found(match: re.Match[str]) -> str:
    quote = match[1] or ""
    return f"{quote}{place(match[0].strip(quote) if quote else match[0])}{quote}"
