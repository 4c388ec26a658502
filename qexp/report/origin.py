"""Origin of runs: the commands that made them, commits, machines and protocols."""

import shlex
from collections.abc import Iterable, Sequence
from itertools import islice, permutations

from qexp.runs.finished import Run
from qexp.runs.signature import UNSIGNED

# words that can change no number and say nothing of the costs either
UNSAID = frozenset({*UNSIGNED, "threads"} - {"table"})
ORDERS = 120  # of the keys that vary; more of them are not tried
TOPS = ("experiment", "search", "model", "data", "calibration", "transform", "method", "weight")

Word = tuple[str, tuple[str, ...]]  # a key and its values; a flag such as `~a` has no value
Words = tuple[Word, ...]


def commands(runs: Iterable[Run]) -> list[str]:
    """Few commands that start these runs and no others.

    Runs that differ only in values of a key are one sweep, as long as every combination of its
    values is one of the runs. Words that cannot change a number are left out.
    """
    made = list(dict.fromkeys(_words(run) for run in runs))
    varying = _varying(made)
    orders = islice(permutations(varying), ORDERS)
    best = min((_merged(made, order) for order in orders), key=len)
    return [_command(words) for words in best]


def commits(runs: Iterable[Run]) -> list[str]:
    """Git revisions; the fingerprint of the code where there is none."""
    return list(dict.fromkeys(revision(run) or f"code {_code(run)}" for run in runs))


def revision(run: Run) -> str:
    """Ten digits, and whether files differed from it; empty where there was no repository."""
    git = run.provenance.get("git") or {}
    return (git.get("revision") or "")[:10] + (" and changes" if git.get("dirty") else "")


def machines(runs: Iterable[Run]) -> list[str]:
    """Devices with the version of torch."""
    found = []
    for run in runs:
        version = (run.provenance.get("versions") or {}).get("torch", "?")
        found.append(f"{', '.join(devices(run)) or 'unknown machine'}, torch {version}")
    return list(dict.fromkeys(found))


def devices(run: Run) -> list[str]:
    """The accelerators, else the processor."""
    machine = run.provenance.get("machine") or {}
    return [str(each) for each in machine.get("cuda") or [machine.get("processor")] if each]


def protocols(runs: Iterable[Run], names: Sequence[str]) -> list[str]:
    """Name and digest of each protocol under which one of these metrics was measured."""
    digests = {
        f"{column.name.rpartition('/')[0]} `{column.digest}`"
        for run in runs
        for column in run.columns
        if column.name in names and column.digest
    }
    return sorted(digests)


def _code(run: Run) -> str:
    return str(run.provenance.get("code") or "unknown")[:10]


def _words(run: Run) -> Words:
    words: list[Word] = []
    for override in run.overrides:
        key, equals, value = override.partition("=")
        top = key.lstrip("+~").partition(".")[0].partition("/")[0]
        if top not in UNSAID:
            words.append((key, (value,) if equals else ()))
    keys = [key for key, _ in words]
    # the order of words matters only where a value is set twice, or below a node set as a value
    nodes = [key for key in keys if key.lstrip("+") not in run.choices]
    free = not any(other.startswith(f"{node}.") for node in nodes for other in keys)
    return tuple(sorted(words, key=_rank) if free and len(set(keys)) == len(keys) else words)


def _rank(word: Word) -> tuple[int, str]:
    top = word[0].partition(".")[0].partition("/")[0]
    return (TOPS.index(top) if top in TOPS else len(TOPS), word[0])


def _varying(made: Sequence[Words]) -> list[str]:
    seen: dict[str, set[tuple[str, ...]]] = {}
    for words in made:
        for key, values in words:
            seen.setdefault(key, set()).add(values)
    return [key for key, values in seen.items() if len(values) > 1]


def _merged(made: Sequence[Words], order: Sequence[str]) -> list[Words]:
    """Commands that are equal but for the values of one key become one, key by key."""
    for key in order:
        groups: dict[Words, list[str]] = {}
        for words in made:
            rest = tuple((name, () if name == key else values) for name, values in words)
            given = [value for name, values in words if name == key for value in values]
            groups.setdefault(rest, []).extend(given)
        made = [
            tuple(
                (name, tuple(dict.fromkeys(given)) if name == key else values)
                for name, values in rest
            )
            for rest, given in groups.items()
        ]
    return list(made)


def _command(words: Words) -> str:
    sweep = ["-m"] if any(len(values) > 1 for _, values in words) else []
    said = [f"{key}={','.join(_ordered(values))}" if values else key for key, values in words]
    return shlex.join(["qexp", *sweep, *said])


def _ordered(values: Sequence[str]) -> Sequence[str]:
    """Numbers by their size."""
    try:
        return sorted(values, key=float)
    except ValueError:
        return values
