"""Settings (runs that differ only in their seed) and pivot tables of their metrics."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from qexp.common.errors import UserError
from qexp.runs.finished import Column, Run

SEED = ("seed",)
MOST = 6  # keys that get a column each if no rows were chosen
FIRST = ("model", "data", "calibration", "transform", "method", "activation", "kv", "weight.bits")


@dataclass(frozen=True)
class Spread:
    """One metric of one setting: its value for each seed."""

    values: Mapping[str, float]

    @property
    def count(self) -> int:
        """The number of seeds."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """NaN if nothing was measured."""
        return statistics.fmean(self.values.values()) if self.values else math.nan

    @property
    def deviation(self) -> float:
        """The sample standard deviation; NaN for fewer than two values or a non-finite one."""
        values = list(self.values.values())
        if len(values) < 2 or not all(map(math.isfinite, values)):
            return math.nan
        return statistics.stdev(values)


@dataclass(frozen=True)
class Setting:
    """The runs of one configuration over its seeds, oldest first. `over`: the keys that vary."""

    runs: tuple[Run, ...]
    over: tuple[str, ...] = SEED

    @property
    def run(self) -> Run:
        """The first run, for everything that does not depend on the seed."""
        return self.runs[0]

    @property
    def recorded(self) -> bool:
        """Whether any of its runs was read from a record."""
        return any(run.recorded for run in self.runs)

    def label(self, key: str) -> str:
        """The choice or value of `key`, the same in all runs."""
        return self.run.label(key)

    def words(self, keys: Sequence[str]) -> dict[str, str]:
        """Labels that need no column title, such as `mse` or `damp=0.1`, by key where defined."""
        words = {}
        for key, name in names(keys).items():
            label = self.label(key)
            if key.endswith("._target_"):  # the class name is enough
                label = label.rpartition(".")[2]
            if label:
                words[key] = label if key in self.run.choices else f"{name}={label}"
        return words

    @cached_property
    def seeded(self) -> dict[Column, dict[str, Run]]:
        """By column, the latest run of each seed (of each value of `over`) that measured it."""
        latest: dict[Column, dict[str, Run]] = {}
        for run in self.runs:
            over = sorted(self.over, key=lambda key: key not in SEED)  # the seed first
            sample = " ".join(str(run.leaves.get(key, run.choices.get(key))) for key in over)
            for column in run.columns:
                latest.setdefault(column, {})[sample] = run
        return latest

    def seed(self, sample: str) -> str:
        """The seed of a key of `seeded`; the key itself if the setting is not over seeds."""
        return sample.partition(" ")[0] if set(SEED) & set(self.over) else sample

    def spread(self, column: Column) -> Spread:
        """The column's values by seed; empty if it was not measured."""
        runs = self.seeded.get(column, {})
        return Spread({seed: run.metrics[column.name] for seed, run in runs.items()})

    def error(self, column: Column) -> float:
        """The standard error over the evaluated examples if there is one seed; otherwise NaN."""
        runs = list(self.seeded.get(column, {}).values())
        name = f"{column.name}_stderr"
        return runs[0].metrics.get(name, math.nan) if len(runs) == 1 else math.nan

    @property
    def bits(self) -> float:
        """Measured bits per quantized weight, the mean over runs; NaN if none is quantized."""
        return self.value("weight/bits")

    def value(self, name: str) -> float:
        """A metric or a number of the configuration by its name, the mean over runs."""
        return _mean(run.value(name) for run in self.runs)

    def by_layer(self, key: str) -> dict[str, float]:
        """A column of `layers.csv` by the linear's name, where it has a number; mean over runs."""
        by_name: dict[str, list[float]] = {}
        for run in self.runs:
            for layer in run.layers:
                if layer.get(key):
                    by_name.setdefault(layer["name"], []).append(float(layer[key]))
        return {name: _mean(values) for name, values in by_name.items()}

    @property
    def seconds(self) -> float:
        """Wall time of a run, the mean over runs."""
        return _mean(run.seconds for run in self.runs)

    def peak(self, kind: str) -> float:
        """The highest peak memory of all runs in GB; NaN if unknown. `kind`: `rss` or `cuda`."""
        return max((run.peak(kind) for run in self.runs), key=lambda peak: (peak == peak, peak))


@dataclass(frozen=True)
class Row:
    """Row labels, and settings by the labels of the column keys."""

    labels: tuple[str, ...]
    cells: Mapping[tuple[str, ...], Setting]


@dataclass(frozen=True)
class Table:
    """Settings by row and column keys; each cell shows the metrics in `columns`."""

    row_keys: tuple[str, ...]
    column_keys: tuple[str, ...]
    rows: tuple[Row, ...]
    places: tuple[tuple[str, ...], ...]  # distinct labels of the column keys, in order
    columns: tuple[Column, ...]
    together: tuple[str, ...] = ()  # row keys that share one column

    @property
    def settings(self) -> list[Setting]:
        """All settings, row by row."""
        return [setting for row in self.rows for setting in row.cells.values()]


def group(runs: Iterable[Run], over: Sequence[str] = SEED) -> list[Setting]:
    """Settings in the order of their first runs.

    Runs of a setting may differ in `over`, keys or groups of keys, and in their evaluators: it may
    have been measured in several runs.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        content = {key: value for key, value in run.leaves.items() if not _within(key, over)}
        groups.setdefault(json.dumps(content, sort_keys=True, default=str), []).append(run)
    for members in groups.values():
        members.sort(key=lambda run: str(run.provenance.get("finished", "")))
    return [Setting(tuple(members), (*over,)) for members in groups.values()]


def differing(settings: Sequence[Setting]) -> list[str]:
    """The keys that distinguish settings.

    The main keys (FIRST) that vary come first, then as few others as needed, with choices of
    config groups before single values.
    """
    over = {key for setting in settings for key in setting.over}
    main = [key for key in FIRST if not _within(key, over)]
    keys = [key for key in main if len({setting.label(key) for setting in settings}) > 1]
    candidates = [key for setting in settings for key in setting.run.settings]
    distinct = len({_values(setting, keys) for setting in settings})
    for key in dict.fromkeys(candidates):
        values = {_values(setting, [*keys, key]) for setting in settings}
        if len(values) > distinct and not _within(key, over):
            keys, distinct = [*keys, key], len(values)
    return keys


def pivot(
    settings: Sequence[Setting],
    rows: Sequence[str] | None = None,
    columns: Sequence[str] = (),
) -> Table:
    """A table with `rows` down and `columns` across.

    The rows are all keys that differ by default; if there are more than MOST, the keys that are
    not in FIRST share a column.

    Raises UserError if two settings fall into one cell: settings are never averaged.
    """
    apart = differing(settings)
    together: list[str] = []
    if rows is None:
        rows = [key for key in apart if key not in columns] or ["method"]
        together = [key for key in rows if key not in FIRST] if len(rows) > MOST else []
    table: dict[tuple[str, ...], dict[tuple[str, ...], Setting]] = {}
    for setting in settings:
        labels = tuple(setting.label(key) for key in rows)
        place = tuple(setting.label(key) for key in columns)
        cells = table.setdefault(labels, {})
        if place in cells:
            keys = differing([cells[place], setting])
            raise UserError(
                f"rows {','.join(rows)}: {' '.join(labels) or 'one row'} would contain several "
                f"settings; add {' or '.join(keys) or 'a key'} to rows or columns"
            )
        cells[place] = setting
    return Table(
        row_keys=tuple(rows),
        column_keys=tuple(columns),
        rows=tuple(Row(labels, cells) for labels, cells in table.items()),
        places=tuple(dict.fromkeys(place for cells in table.values() for place in cells)),
        columns=tuple(dict.fromkeys(column for each in settings for column in each.seeded)),
        together=tuple(together),
    )


def names(keys: Sequence[str]) -> dict[str, str]:
    """For each key its shortest suffix of dotted parts that no other key ends with."""
    full = {key: key.removesuffix("._target_") for key in keys}
    short = {}
    for key, name in full.items():
        parts = name.split(".")
        suffixes = [".".join(parts[at:]) for at in range(len(parts) - 1, -1, -1)]
        others = [f".{other}" for each, other in full.items() if each != key]
        unique = [end for end in suffixes if not any(each.endswith(f".{end}") for each in others)]
        short[key] = unique[0] if unique else name
    return short


def _within(key: str, over: Iterable[str]) -> bool:
    """Whether a key is one of these or below one of them."""
    return any(key == each or key.startswith((f"{each}.", f"{each}/")) for each in over)


def _values(setting: Setting, keys: Sequence[str]) -> tuple[str, ...]:
    return tuple(str(setting.run.settings.get(key)) for key in keys)


def _mean(values: Iterable[float]) -> float:
    measured = [value for value in values if not math.isnan(value)]
    return statistics.fmean(measured) if measured else math.nan
