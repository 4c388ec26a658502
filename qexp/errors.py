"""What is wrong with a run that its user can put right."""

from collections.abc import Iterable


class UserError(Exception):
    """One sentence that names the config key or the file, what is wrong and what would be right.

    The command prints it without a traceback and exits with 1. Anything else that is raised is a
    fault of the program and keeps its traceback.
    """


def known(where: str, settings: object, **words: Iterable[str]) -> None:
    """UserError unless each of these fields is one of its words. `where` is the config key of
    `settings`, whose fields are the keys below it."""
    for key, choices in words.items():
        if (value := getattr(settings, key)) not in choices:
            raise UserError(f"{where}.{key}={value} is unknown: give {' or '.join(choices)}.")


def whole(where: str, settings: object, **least: int) -> None:
    """UserError unless each of these fields is a whole number, and not below its least."""
    for key, low in least.items():
        value = getattr(settings, key)
        if type(value) is not int or value < low:
            raise UserError(f"{where}.{key}={value}: give a whole number, {low} or more.")


def real(where: str, settings: object, **least: int) -> None:
    """UserError unless each of these fields is a number, and not below its least."""
    for key, low in least.items():
        value = getattr(settings, key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= low:
            raise UserError(f"{where}.{key}={value}: give a number, {low} or more.")
