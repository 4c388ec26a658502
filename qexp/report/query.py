"""A question to finished runs (rows, columns, metrics, baseline), and the table that answers it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase

from qexp.common.errors import UserError
from qexp.report import tables
from qexp.report.pivot import SEED, Setting, Table, group, pivot
from qexp.report.significance import counterparts, effect
from qexp.report.tables import Sheet
from qexp.runs.finished import Run
from qexp.runs.signature import WORDS

STORED = (
    "The checkpoint of model={model} is stored quantized ({types}). Its weights lie on these grids "
    "already, so rounding to a grid that contains them is lossless by construction (Q4_1: 4 bits "
    "with real zero points in groups of 32 columns), and gaps to float are not those of a float "
    "checkpoint."
)


@dataclass(frozen=True)
class Query:
    """`rows` and `columns`: keys of the configuration; all that differ if there are no rows.
    `metrics`: their names, with `*` and `?`; all if there are none. `over`: keys whose values are
    averaged over. `baseline`: the labels of what others are compared with.

    `where`: values by key, alternatives of each other; a run must match one of the mappings if
    there are any. Rows and columns follow the order of the values. Baselines need not match.
    `sort`: the metric whose best value comes first; rows without it come last.
    """

    rows: Sequence[str] = ()
    columns: Sequence[str] = ()
    metrics: Sequence[str] = ()
    over: Sequence[str] = SEED
    baseline: Mapping[str, str] = field(default_factory=dict)
    where: Sequence[Mapping[str, Sequence[str]]] = ()
    sort: str = ""

    @property
    def against(self) -> str:
        """The name of the baseline."""
        return ",".join(f"{key}={value}" for key, value in self.baseline.items())


@dataclass(frozen=True)
class Answer:
    """`baselines`: by id of the setting that is compared with it. `effects`: sentences."""

    query: Query
    table: Table
    baselines: Mapping[int, Setting]
    effects: Sequence[str]

    def legend(self, sheet: Sheet) -> list[str]:
        """The signs of the sheet, and what the baseline's keys do over several rows."""
        return [*tables.legend(sheet, self.query.against), *self.effects]


def ask(runs: Sequence[Run], query: Query) -> Answer:
    """Raises UserError for a key or a metric that no run has, for a condition that no run meets,
    and if two settings fall into one cell."""
    keys = {"rows": query.rows, "columns": query.columns, "over": query.over}
    keys["where"] = [key for mapping in query.where for key in mapping]
    for option, names in keys.items():
        _known(runs, option, names)
    settings = group(runs, query.over)
    baselines = counterparts(settings, query.baseline) if query.baseline else {}
    chosen = _chosen(settings, query)
    if query.sort:
        chosen = _sorted(chosen, query.sort)
    table = _select(pivot(chosen, query.rows or None, query.columns), query.metrics)
    return Answer(query, table, baselines, _effects(table, baselines, list(query.baseline)))


def _sorted(settings: Sequence[Setting], metric: str) -> list[Setting]:
    columns = {each.name: each for each in pivot(settings).columns}
    if metric not in columns:
        raise UserError(f"sort {metric}: no run has this metric; there are {', '.join(columns)}")
    sign = -1 if columns[metric].higher else 1

    def place(setting: Setting) -> tuple[bool, float]:
        value = setting.value(metric)
        return math.isnan(value), sign * value

    return sorted(settings, key=place)


def _chosen(settings: Sequence[Setting], query: Query) -> list[Setting]:
    """The settings that meet the condition, in its order."""
    if not query.where:
        return list(settings)
    order: dict[str, dict[str, int]] = {}
    for mapping in query.where:
        for key, values in mapping.items():
            known = order.setdefault(key, {})
            for value in values:
                known.setdefault(value, len(known))

    def meets(setting: Setting, mapping: Mapping[str, Sequence[str]]) -> bool:
        return all(setting.label(key) in values for key, values in mapping.items())

    def place(setting: Setting) -> list[int]:
        keys = [key for key in (*query.rows, *query.columns) if key in order]
        return [order[key].get(setting.label(key), -1) for key in keys]

    for mapping in query.where:
        for key, values in mapping.items():
            there = {setting.label(key) for setting in settings}
            for value in values:
                if value not in there:
                    seen = ", ".join(sorted(label or '""' for label in there))
                    raise UserError(f"where {key}={value}: no run has it; there are {seen}")
    chosen = [each for each in settings if any(meets(each, mapping) for mapping in query.where)]
    if not chosen:
        raise UserError("where: no run meets all of its conditions; name fewer of them")
    return sorted(chosen, key=place)


def _effects(table: Table, baselines: Mapping[int, Setting], keys: Sequence[str]) -> list[str]:
    """What each value of the baseline's keys does over several rows, tested by seed; a sentence for
    each value and metric that has more than one pair."""
    said = []
    for column in table.columns:
        pairs: dict[str, list[tuple[Setting, Setting]]] = {}
        for setting in table.settings:
            baseline = baselines.get(id(setting))
            if baseline and setting.spread(column).count and baseline.spread(column).count:
                words = " ".join(setting.words(keys).values())
                pairs.setdefault(words, []).append((setting, baseline))
        for words, found in pairs.items():
            moved = effect(found, column) if len(found) > 1 else None
            if moved is not None and moved.tested:
                said.append(
                    f"{column.title}, {words}: over {len(found)} rows, averaged within each of "
                    f"{moved.count} seeds, {moved.interval()}, p {moved.p:.2g}."
                )
    return said


def _select(table: Table, patterns: Sequence[str]) -> Table:
    """The table with only the metrics that match a pattern, in the order of the patterns; all of
    them without patterns.

    Raises UserError if no metric matches, or none a pattern without wildcards.
    """
    if not patterns:
        return table
    by_pattern = {p: [c for c in table.columns if fnmatchcase(c.name, p)] for p in patterns}
    kept = [column for found in by_pattern.values() for column in found]
    unmet = [p for p, found in by_pattern.items() if not found and not set(p) & set("*?[")]
    if unmet or not kept:
        there = ", ".join(dict.fromkeys(column.name for column in table.columns))
        raise UserError(
            f"metrics {','.join(unmet or patterns)}: none fits; there are {there or 'none'}"
        )
    return replace(table, columns=tuple(dict.fromkeys(kept)))


def _known(runs: Sequence[Run], option: str, keys: Sequence[str]) -> None:
    """Raises UserError for a key that no run has: every cell would be empty."""
    there = {*WORDS, *(key for run in runs for key in (*run.choices, *run.leaves))}
    for key in keys:
        if key not in there:
            near = ", ".join(get_close_matches(key, there)) or "weight.bits, method, seed"
            raise UserError(f"{option} {key}: no run has this key; perhaps {near}")


def stored(settings: Iterable[Setting]) -> list[str]:
    """A note for each model whose checkpoint is stored quantized, by what its runs recorded."""
    found = {}
    for run in (run for setting in settings for run in setting.runs):
        types = run.provenance.get("tensor_types", {}).items()
        grids = [(name, each) for name, each in types if each["block"] > 1]
        if grids:
            parts = [
                f"{e['tensors']} tensors {name} in blocks of {e['block']}" for name, e in grids
            ]
            found[run.label("model")] = ", ".join(parts)
    return [STORED.format(model=model, types=types) for model, types in sorted(found.items())]
