"""Command `qexp cache [--prune]`: list of the cache's entries, and their removal."""

import argparse
from collections.abc import Sequence

from qexp.common.cache_entries import PERIODS, _size, default_folder, prune, stored, summary, table
from qexp.common.errors import UserError

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def main(arguments: Sequence[str]) -> None:
    """Lists the cache's entries; with --prune first removes those that the options select."""
    parser = argparse.ArgumentParser("qexp cache", description=main.__doc__)
    parser.add_argument("--prune", action="store_true", help="remove entries")
    parser.add_argument("--kind", action="append", default=[], help="of this kind only")
    parser.add_argument("--older", default="1h", help="idle for so long: 30m, 12h, 7d (default 1h)")
    parser.add_argument("--size", help="only until the cache takes no more: 500M, 20G")
    options = parser.parse_args(arguments)
    if options.prune:
        size = None if options.size is None else _number("--size", options.size, UNITS)
        older = _number("--older", options.older, PERIODS)
        gone = prune(default_folder(), options.kind, older, size)
        print(f"removed {len(gone)} entries, {_size(sum(entry.bytes for entry in gone))}")
    print(table(stored()))
    print(summary())


def _number(option: str, text: str, units: dict[str, int]) -> float:
    unit = next((unit for unit in units if unit and text.lower().endswith(unit.lower())), "")
    try:
        return float(text[: len(text) - len(unit)]) * units.get(unit, 1)
    except ValueError as error:
        names = ", ".join(filter(None, units))
        raise UserError(f"{option} {text}: give a number with a unit ({names})") from error
