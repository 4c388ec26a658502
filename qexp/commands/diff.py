"""Comparison of two runs: differences in configuration, provenance, metrics and layer errors."""

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qexp.common.errors import UserError
from qexp.report import tables
from qexp.runs import record, results
from qexp.runs.finished import Run, flat, load
from qexp.runs.repeatable import differences

ABSENT = "-"
# different in any two runs, or shown as a cost
NOT_ORIGIN = ("started", "finished", "command", "stages", "protocols")

Lines = list[tuple[str, ...]]


def main(arguments: Sequence[str]) -> None:
    """The command line of `qexp diff`."""
    parser = argparse.ArgumentParser(prog="qexp diff", description=__doc__)
    parser.add_argument(
        "runs", nargs=2, type=Path, metavar="RUN", help="folder of a finished run, or its record"
    )
    parser.add_argument("--layers", type=int, default=10, help="layers to list; 10 by default")
    chosen = parser.parse_args(arguments)
    for folder in chosen.runs:
        if not folder.is_file() and not (folder / results.METRICS).is_file():
            raise UserError(
                f"{folder}: has no {results.METRICS}; give the folder of a finished run, or a "
                "record"
            )
    one, other = map(load, chosen.runs)
    print(f"a  {one.place}  {one.command}\nb  {other.place}  {other.command}")
    print("\n".join(report(one, other, chosen.layers)))


def report(one: Run, other: Run, count: int = 10) -> Iterator[str]:
    """The lines of all sections, including those without differences. count: layers to list."""
    origin = [flat(run.provenance, without=NOT_ORIGIN) for run in (one, other)]
    yield from _section("configuration", ("a", "b"), changes(one.settings, other.settings))
    yield from _section("code, versions, machine, inputs", ("a", "b"), changes(*origin))
    if facts := differences(one.provenance, other.provenance):
        yield f"last digits may differ: {', '.join(each.name for each in facts)}"
    yield from _section("metrics", ("a", "b", "b - a"), metrics(one, other))
    found = layers(one, other)
    titles = ("error of a", "error of b", "b / a")
    yield from _section(f"layers ({len(found)} differ)", titles, found[:count])


def changes(one: Mapping[str, Any], other: Mapping[str, Any]) -> Lines:
    """Keys with different values."""
    keys = dict.fromkeys([*one, *other])
    pairs = {key: (one.get(key, ABSENT), other.get(key, ABSENT)) for key in keys}
    return [(key, _text(a), _text(b)) for key, (a, b) in pairs.items() if a != b]


def metrics(one: Run, other: Run) -> Lines:
    """Metrics that differ, seconds and memory last; no difference if their definitions differ."""
    digests = [{column.name: column.digest for column in run.columns} for run in (one, other)]
    cost = [{"seconds": run.seconds, "memory GB": run.peak("rss")} for run in (one, other)]
    first, second = one.metrics | cost[0], other.metrics | cost[1]
    lines: Lines = []
    for name in dict.fromkeys([*first, *second]):
        a, b = first.get(name), second.get(name)
        if a is None or b is None:
            lines.append((name, _number(a), _number(b), ""))
        elif digests[0].get(name) != digests[1].get(name):
            lines.append((name, _number(a), _number(b), "not comparable: definitions differ"))
        elif a != b and not (math.isnan(a) and math.isnan(b)):
            lines.append((name, _number(a), _number(b), f"{b - a:+.4g}"))
    return lines


def layers(one: Run, other: Run) -> Lines:
    """Linears with different errors, the largest ratio first."""
    first, second = (
        {each["name"]: float(each["error"]) for each in r.layers} for r in (one, other)
    )
    found = []
    for name in dict.fromkeys([*first, *second]):
        a, b = first.get(name), second.get(name)
        if a is None or b is None:
            found.append((math.inf, (name, _number(a), _number(b), ABSENT)))
        elif _kept(a) != _kept(b):
            ratio = b / a if a else math.inf
            size = abs(math.log(ratio)) if 0 < ratio < math.inf else math.inf
            found.append((size, (name, f"{a:.3g}", f"{b:.3g}", f"{ratio:.3g}")))
    return [line for _, line in sorted(found, key=lambda entry: -entry[0])]


def _section(title: str, heads: tuple[str, ...], lines: Lines) -> Iterator[str]:
    yield ""
    if not lines:
        yield f"{title}: nothing differs"
        return
    whole = [(title, *heads), *lines]
    widths = [max(len(line[i]) for line in whole) for i in range(len(heads) + 1)]
    for line in whole:
        yield "  ".join(
            text.ljust(width) for text, width in zip(line, widths, strict=True)
        ).rstrip()


def _kept(error: float) -> str:
    """The digits that a record keeps of a layer's error, so that a run equals its record."""
    return f"{error:.{record.DIGITS}g}"


def _number(value: float | None) -> str:
    return ABSENT if value is None else tables.number(value) or "nan"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
