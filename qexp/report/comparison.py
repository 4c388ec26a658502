"""Tables with named rows, of papers or leaderboards: an experiment's key `table`."""

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from omegaconf import DictConfig, OmegaConf

from qexp.common.errors import UserError, check_bool
from qexp.report.pivot import Setting, Spread
from qexp.report.significance import compare
from qexp.runs.finished import Column
from qexp.runs.signature import WORDS


@dataclass(frozen=True)
class Place:
    """A column of the table: a metric of a model.

    `replaced`: what differs from the paper (model, data); the numbers of such a column are not
    compared, only its `orders` are. `judged`: false if not even those are checked (a random model).
    `rows`: overrides for some rows, instead of theirs. `orders`: instead of the table's.
    """

    metric: str
    overrides: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    replaced: str = ""
    judged: bool = True
    rows: dict[str, list[str]] = field(default_factory=dict)
    orders: list[str] | None = None


@dataclass(frozen=True)
class Row:
    """A method and its published numbers by column.

    `tolerance`: relative to the published number; the table's if None. `seeded`: whether the
    result depends on the seed. `label`, `kind`: of its runs, by which pages show and group them.
    """

    overrides: list[str] = field(default_factory=list)
    published: dict[str, float] = field(default_factory=dict)
    tolerance: float | None = None
    seeded: bool = True
    label: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Comparison:
    """A table. `source`, `inferred`, `tolerance`: of its published numbers, if it has any.
    `orders`: rows by increasing expected number, such as `float < a < b`."""

    title: str
    columns: dict[str, Place]
    rows: dict[str, Row]
    source: str = ""
    inferred: str = ""
    tolerance: float = 0.0
    orders: list[str] = field(default_factory=list)

    def pairs(self, column: str) -> list[tuple[str, str]]:
        """Neighbouring rows in the expected orders of a column; none if it is not judged."""
        place = self.columns[column]
        orders = (self.orders if place.orders is None else place.orders) if place.judged else []
        chains = [[word.strip() for word in order.split("<")] for order in orders]
        return [pair for chain in chains for pair in pairwise(chain)]

    def over(self, text: str) -> "Comparison":
        """The same table over other seeds, as a test of its orders may need: `0,1,2`."""
        words = text.split(",")
        if not all(word.isdecimal() for word in words):
            raise UserError(f"--seeds {text}: give whole numbers by commas, for example 0,1,2")
        seeds = [int(word) for word in words]
        columns = {key: replace(place, seeds=seeds) for key, place in self.columns.items()}
        return replace(self, columns=columns)

    def wanted(self, column: str) -> list[str]:
        """The rows to run for a column: all if it is replaced or nothing is published, else those
        with a published number."""
        whole = self.columns[column].replaced or not self.is_published
        return [name for name, row in self.rows.items() if whole or column in row.published]

    @property
    def is_published(self) -> bool:
        """Whether any row has a published number."""
        return any(row.published for row in self.rows.values())

    def jobs(self, row: str, column: str) -> list[list[str]]:
        """The overrides of each job of a cell; the row's come after the column's."""
        place = self.columns[column]
        row_overrides = place.rows.get(row, self.rows[row].overrides)
        seeds = place.seeds if self.rows[row].seeded else place.seeds[:1]
        words = [f'{key}="{word}"' for key in WORDS if (word := getattr(self.rows[row], key))]
        return [[*place.overrides, *row_overrides, *words, f"seed={seed}"] for seed in seeds]

    def verdict(self, row: str, column: str, measured: Spread, replaced: str = "") -> str:
        """Compares a measured number with the published one.

        `replaced`: a replacement that was only known at run time, such as the data.
        """
        published = self.rows[row].published.get(column)
        if not measured.count:
            return "not run"
        if replaced := self.columns[column].replaced or replaced:
            return f"not comparable: {replaced} replaced"
        if published is None:
            return ""
        tolerance = self.rows[row].tolerance
        allowed = published * (self.tolerance if tolerance is None else tolerance)
        return "reached" if abs(measured.mean - published) <= allowed else "not reached"


def read(node: DictConfig, name: str) -> Comparison:
    """The `table` of the composed experiment `name`.

    Raises UserError for an unknown or missing field, row or column.
    """
    content: Any = OmegaConf.to_container(node, resolve=True)
    try:
        columns = {key: Place(**place) for key, place in content.pop("columns").items()}
        rows = {key: _row(**row) for key, row in content.pop("rows").items()}
        made = Comparison(**content, columns=columns, rows=rows)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"experiment/{name}.yaml: table: {error}") from error
    for part, settings, switch in (("columns", columns, "judged"), ("rows", rows, "seeded")):
        for key, each in settings.items():
            check_bool(f"experiment/{name}.yaml: table.{part}.{key}", each, switch)
    ordered = [*made.orders, *(o for place in columns.values() for o in place.orders or [])]
    unknown = {word.strip() for order in ordered for word in order.split("<")} - set(made.rows)
    unknown |= {c for row in made.rows.values() for c in row.published} - set(made.columns)
    unknown |= {row for place in made.columns.values() for row in place.rows} - set(made.rows)
    if unknown:
        names = ", ".join(sorted(unknown))
        raise UserError(f"experiment/{name}.yaml: {names}: neither a row nor a column")
    return made


def _row(published: dict[str, float | int] | None = None, **fields: Any) -> Row:
    return Row(published={key: float(value) for key, value in (published or {}).items()}, **fields)


def order(
    less: Setting, more: Setting, column: Column, seeded: tuple[bool, bool] = (True, True)
) -> tuple[str, str]:
    """What seeds say of `less` being below `more`, and the figures.

    `holds`: the interval of the paired difference is below zero; `reversed`: it is above;
    `level`: it includes zero; `untested`: one seed, or seeds that change nothing. `seeded`: whether
    a seed can change each; where it cannot, the one value stands for every seed of the other.
    """
    settings = (less, more)
    if not all(each.spread(column).count for each in settings):
        return "not run", ""
    one, other = (
        each if own else constant(each, rival)
        for each, rival, own in zip(settings, (more, less), seeded, strict=True)
    )
    moved = compare(one, other, column)
    if moved is None or moved.count < 2:
        return "untested", "one seed of both"
    said = f"{moved.below} of {moved.count} seeds"
    if not moved.tested:
        return "untested", f"{said}, no variation or no finite number"
    said += f", {moved.interval()}, p {moved.p:.2g}"
    return "holds" if moved.high < 0 else "reversed" if moved.low > 0 else "level", said


def constant(setting: Setting, rival: Setting) -> Setting:
    """A setting that no seed changes, as if it had been run with each seed of its rival."""
    if len(setting.runs) != 1 or len(setting.over) != 1:
        return setting
    [key], [run] = setting.over, setting.runs
    seeds = dict.fromkeys(each.leaves.get(key) for each in rival.runs)
    made = (replace(run, leaves={**run.leaves, key: seed}) for seed in seeds)
    return replace(setting, runs=tuple(made))
