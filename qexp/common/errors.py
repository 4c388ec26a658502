"""User errors, and checks of configuration values."""

from collections.abc import Callable, Iterable
from functools import partial
from math import inf
from operator import le
from typing import Any


class UserError(Exception):
    """A mistake of the user: one sentence that names the config key or the file, what is wrong and
    what would be right.

    The command prints it without a traceback and exits with 1. Any other exception is a bug and
    keeps its traceback.
    """


class FieldError(ValueError):
    """A wrong field of an object that can be at several config keys.

    `instantiate`, which knows the key, converts it to a UserError.
    """


# What follows checks the fields `key` of `settings`. `where` is the config key of `settings`, below
# which its fields are, empty for the root; None, where that is not known, makes the UserError a
# FieldError.


def check_choice(where: str | None, settings: object, **words: Iterable[str]) -> None:
    """UserError unless each of these fields is one of the words given for it."""
    for key, choices in words.items():
        if (value := getattr(settings, key)) not in choices:
            raise _wrong(where, f"{key}={value} is unknown: give {' or '.join(choices)}.")


def check_bool(where: str | None, settings: object, *keys: str) -> None:
    """UserError unless each of these fields is true or false."""
    for key in keys:
        if type(value := getattr(settings, key)) is not bool:
            raise _wrong(where, f"{key}={value}: give true or false.")


def check_int(where: str | None, settings: object, **least: int) -> None:
    """UserError unless each of these fields is an integer and at least the value given for it."""
    for key, low in least.items():
        value = getattr(settings, key)
        if type(value) is not int or value < low:
            raise _wrong(where, f"{key}={value}: give a whole number, {low} or more.")


def check_number(where: str | None, settings: object, **least: int) -> None:
    """UserError unless each of these fields is a number and at least the value given for it."""
    for key, low in least.items():
        check_range(where, settings, f"a number, {low} or more", partial(le, low), key)


def check_finite(where: str | None, settings: object, *keys: str) -> None:
    """UserError unless each of these fields is a finite number, 0 or more."""
    check_range(where, settings, "a finite number, 0 or more", lambda x: 0 <= x < inf, *keys)


def check_positive(where: str | None, settings: object, *keys: str) -> None:
    """UserError unless each of these fields is a finite number above 0."""
    check_range(where, settings, "a finite number above 0", lambda x: 0 < x < inf, *keys)


def check_range(
    where: str | None, settings: object, right: str, inside: Callable[[Any], bool], *keys: str
) -> None:
    """UserError unless each of these fields is a number `inside`; `right` describes those."""
    for key in keys:
        value = getattr(settings, key)
        if type(value) not in (int, float) or not inside(value):
            raise _wrong(where, f"{key}={value}: give {right}.")


def _wrong(where: str | None, said: str) -> Exception:
    if where is None:
        return FieldError(said)
    return UserError(f"{where}.{said}" if where else said)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
