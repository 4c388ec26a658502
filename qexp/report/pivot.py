"""Runs that differ in their seed alone are one setting: its mean, its spread, its rivals."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from qexp.common.errors import UserError
from qexp.runs.finished import Column, Run

SEED = ("seed",)
MOST = 6  # keys that have a column each where none were chosen
FIRST = ("model", "data", "calibration", "transform", "method", "activation", "kv", "weight.bits")


@dataclass(frozen=True)
class Spread:
    """One metric of one setting: its value for each seed."""

    values: Mapping[str, float]

    @property
    def count(self) -> int:
        """How many seeds."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """NaN where nothing was measured."""
        return statistics.fmean(self.values.values()) if self.values else math.nan

    @property
    def deviation(self) -> float:
        """Of a sample; NaN for fewer than two finite values."""
        values = list(self.values.values())
        if len(values) < 2 or not all(map(math.isfinite, values)):
            return math.nan
        return statistics.stdev(values)


@dataclass(frozen=True)
class Setting:
    """The runs of one configuration over its seeds, the oldest first."""

    runs: tuple[Run, ...]
    over: tuple[str, ...] = SEED

    @property
    def run(self) -> Run:
        """The one that speaks for all where only seeds differ."""
        return self.runs[0]

    def label(self, key: str) -> str:
        """A choice or value that all of its runs have."""
        return self.run.label(key)

    def words(self, keys: Sequence[str]) -> dict[str, str]:
        """The same where no title stands above: `mse`, `damp=0.1`, for those keys that it has."""
        found = {}
        for key, name in names(keys).items():
            label = self.label(key)
            if key.endswith("._target_"):  # a class, of which a reader knows the name
                label = label.rpartition(".")[2]
            if label:
                found[key] = label if key in self.run.choices else f"{name}={label}"
        return found

    @cached_property
    def seeded(self) -> dict[Column, dict[str, Run]]:
        """The latest run of each seed that has the column."""
        found: dict[Column, dict[str, Run]] = {}
        for run in self.runs:
            seed = " ".join(str(run.leaves.get(key)) for key in self.over)
            for column in run.columns:
                found.setdefault(column, {})[seed] = run
        return found

    def spread(self, column: Column) -> Spread:
        """The column's values by seed, none where it was not measured."""
        runs = self.seeded.get(column, {})
        return Spread({seed: run.metrics[column.name] for seed, run in runs.items()})

    def error(self, column: Column) -> float:
        """The standard error over what was evaluated, of the only seed; NaN for several."""
        runs = list(self.seeded.get(column, {}).values())
        name = f"{column.name}_stderr"
        return runs[0].metrics.get(name, math.nan) if len(runs) == 1 else math.nan

    @property
    def bits(self) -> float:
        """Measured bits per quantized weight, the mean over runs; NaN where none is quantized."""
        return self.value("weight/bits")

    def value(self, name: str) -> float:
        """A metric by its name or a number of the configuration, the mean over runs."""
        return _mean(run.value(name) for run in self.runs)

    @property
    def layers(self) -> dict[str, float]:
        """The error of each linear, the mean over runs."""
        found: dict[str, list[float]] = {}
        for run in self.runs:
            for layer in run.layers:
                found.setdefault(layer["name"], []).append(float(layer["error"]))
        return {name: _mean(errors) for name, errors in found.items()}

    @property
    def seconds(self) -> float:
        """Wall time of a run, the mean over runs."""
        return _mean(run.seconds for run in self.runs)

    def peak(self, kind: str) -> float:
        """The highest of all runs in GB."""
        return max((run.peak(kind) for run in self.runs), key=lambda peak: (peak == peak, peak))


@dataclass(frozen=True)
class Row:
    """Labels, and a setting for each place in the columns that has one."""

    labels: tuple[str, ...]
    cells: Mapping[tuple[str, ...], Setting]


@dataclass(frozen=True)
class Table:
    """Settings by the keys of rows and columns; under each place, metrics by their definition."""

    row_keys: tuple[str, ...]
    column_keys: tuple[str, ...]
    rows: tuple[Row, ...]
    places: tuple[tuple[str, ...], ...]  # labels of the column keys, in order
    columns: tuple[Column, ...]
    together: tuple[str, ...] = ()  # those of the row keys that share one column

    @property
    def settings(self) -> list[Setting]:
        """All of them, by rows."""
        return [setting for row in self.rows for setting in row.cells.values()]


def group(runs: Iterable[Run], over: Sequence[str] = SEED) -> list[Setting]:
    """Settings in the order of their first runs; `over` are the keys that may differ within one.

    What was evaluated does not count: a setting may have been measured in several runs.
    """
    found: dict[str, list[Run]] = {}
    for run in runs:
        content = {key: value for key, value in run.leaves.items() if key not in over}
        found.setdefault(json.dumps(content, sort_keys=True, default=str), []).append(run)
    return [Setting(tuple(sorted(members, key=_finished)), (*over,)) for members in found.values()]


def differing(settings: Sequence[Setting]) -> list[str]:
    """The keys that tell settings apart: first those that a reader looks for, where they vary, then
    the fewest others, choices of groups before single values."""
    kept = [key for key in FIRST if len({setting.label(key) for setting in settings}) > 1]
    known = [key for setting in settings for key in setting.run.settings]
    over = {key for setting in settings for key in setting.over}
    parts = len({_told(setting, kept) for setting in settings})
    for key in dict.fromkeys(known):
        told = {_told(setting, [*kept, key]) for setting in settings}
        if len(told) > parts and key not in over:
            kept, parts = [*kept, key], len(told)
    return kept


def pivot(
    settings: Sequence[Setting],
    rows: Sequence[str] | None = None,
    columns: Sequence[str] = (),
    metrics: Sequence[Column] | None = None,
) -> Table:
    """A table with `rows` down and `columns` across.

    By default the rows are all keys that differ; of more than MOST, those that a reader does not
    look for share a column.

    Raises UserError when two settings fall into one cell: settings are never averaged.
    """
    apart = differing(settings)
    together: list[str] = []
    if rows is None:
        rows = [key for key in apart if key not in columns] or ["method"]
        together = [key for key in rows if key not in FIRST] if len(rows) > MOST else []
    found: dict[tuple[str, ...], dict[tuple[str, ...], Setting]] = {}
    for setting in settings:
        labels = tuple(setting.label(key) for key in rows)
        place = tuple(setting.label(key) for key in columns)
        cells = found.setdefault(labels, {})
        if place in cells:
            keys = differing([cells[place], setting])
            raise UserError(
                f"--rows {','.join(rows)}: {' '.join(labels) or 'one row'} would stand for several "
                f"settings; add {' or '.join(keys) or 'a key'} to --rows or --columns"
            )
        cells[place] = setting
    if metrics is None:
        metrics = [column for setting in settings for column in setting.seeded]
    return Table(
        row_keys=tuple(rows),
        column_keys=tuple(columns),
        rows=tuple(Row(labels, cells) for labels, cells in found.items()),
        places=tuple(dict.fromkeys(place for cells in found.values() for place in cells)),
        columns=tuple(dict.fromkeys(metrics)),
        together=tuple(together),
    )


def names(keys: Sequence[str]) -> dict[str, str]:
    """For each key its last parts, as many as no other of them ends with."""
    whole = {key: key.removesuffix("._target_") for key in keys}
    found = {}
    for key, name in whole.items():
        parts = name.split(".")
        ends = [".".join(parts[at:]) for at in range(len(parts) - 1, -1, -1)]
        others = [f".{other}" for each, other in whole.items() if each != key]
        alone = [end for end in ends if not any(each.endswith(f".{end}") for each in others)]
        found[key] = alone[0] if alone else name
    return found


def _finished(run: Run) -> str:
    return str(run.provenance.get("finished", ""))


def _told(setting: Setting, keys: Sequence[str]) -> tuple[str, ...]:
    return tuple(str(setting.run.settings.get(key)) for key in keys)


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return statistics.fmean(known) if known else math.nan
