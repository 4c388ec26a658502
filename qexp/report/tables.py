"""Layout of settings as a table, its numbers as text, and its legend."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from qexp.report.pivot import Row, Setting, Table
from qexp.report.significance import NEAR, Difference, compare, standing
from qexp.runs.finished import Column

RECORD = "ʳ"  # after the number of a setting
TOGETHER = "settings"
UNSAID = f"Values that the column {TOGETHER} omits, for settings with such a key: "
COSTS = ("bits", "seconds", "memory GB", "cuda GB", "run")
LEVEL = "†"
# the signs of a table, and their sentences
SIGNS = {
    "±": "± … (n) is the sample standard deviation over n seeds around their mean.",
    "(se ": (
        "(se …) is the standard error over what one run evaluated, such as the windows of a text."
    ),
    "**": f"The best of a column among several settings within {NEAR} bits of it is bold.",
    LEVEL: (
        f"{LEVEL} marks a setting level with the best: the 95 % interval of their paired "
        "difference over seeds (by t; of perplexities by their logarithms) includes zero. "
        "Nothing is tested with one seed."
    ),
    "Δ": (
        "Δ is the difference from {baseline}, paired over shared seeds, with its 95 % interval "
        "(by t, in percent and by logarithms for perplexities; not corrected for multiple tests)."
    ),
    RECORD: f"{RECORD}: read from a record, which was committed; the run's folder is not here.",
}


class Cell(NamedTuple):
    """The content of one cell; `value` is its sort key. `level`: with the best of its column."""

    text: str
    value: float = math.nan
    bold: bool = False
    note: str = ""
    setting: Setting | None = None
    level: bool = False


@dataclass(frozen=True)
class Style:
    """Words and numbers of a table.

    `titles`: by the name of a key, a metric or a cost. `labels`: by key, then by value. `digits`:
    decimals of metrics; by their size if None. `costs`: those of COSTS that are shown.
    """

    titles: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    digits: int | None = None
    costs: Sequence[str] = COSTS

    def title(self, name: str, default: str = "") -> str:
        """The heading of a key, a metric or a cost."""
        return self.titles.get(name, default or name)

    def label(self, key: str, value: str) -> str:
        """A value of a key, as it is shown."""
        return self.labels.get(key, {}).get(value, value)


PLAIN = Style()


@dataclass(frozen=True)
class Sheet:
    """A table as rows of cells; a column's head is a label of the column keys, and a title."""

    heads: tuple[tuple[str, str], ...]
    labels: int  # the number of leading columns that are labels
    rows: tuple[tuple[Cell, ...], ...]
    numbers: Mapping[int, int]  # id of a setting → its number in the list of runs
    notes: tuple[str, ...] = ()  # explanations under the table

    @property
    def titles(self) -> list[str]:
        """Both parts of each column's head in one line."""
        return [f"{above}: {title}" if above else title for above, title in self.heads]


def lay(table: Table, baselines: Mapping[int, Setting], style: Style = PLAIN) -> Sheet:
    """Labels, then bits and metrics for each label of the column keys, costs and run numbers.

    `baselines`: by id of the setting that is compared with it. Empty columns are removed.
    """
    numbers = {id(setting): number for number, setting in enumerate(table.settings, 1)}
    ranks = standing(table)
    places = [(_above(table, place, style), place) for place in table.places]
    separate = [i for i, key in enumerate(table.row_keys) if key not in table.together]
    heads = [("", style.title(table.row_keys[i])) for i in separate] + [("", TOGETHER)]
    usual = _usual(table)
    bits = ["bits"] if "bits" in style.costs else []
    for above, _ in places:
        heads += [(above, style.title(name)) for name in bits]
        heads += [(above, style.title(each.name, each.title)) for each in table.columns]
    heads += [("", style.title(name)) for name in style.costs if name != "bits"]
    rows = []
    for row in table.rows:
        cells = [Cell(style.label(table.row_keys[i], row.labels[i])) for i in separate]
        cells.append(Cell(_rest(table, row, separate, usual)))
        for _, place in places:
            if (setting := row.cells.get(place)) is None:
                cells += [Cell("")] * (len(bits) + len(table.columns))
                continue
            cells += [Cell(_plain(setting.bits, 2), setting.bits)] * len(bits)
            for column in table.columns:
                cell = _cell(setting, column, baselines.get(id(setting)), style)
                at = (id(setting), column)
                cells.append(cell._replace(bold=at in ranks.best, level=at in ranks.level))
        settings = list(row.cells.values())
        cells += [_cost(name, settings, numbers) for name in style.costs if name != "bits"]
        rows.append(cells)
    filled = [i for i in range(len(heads)) if any(cells[i].text for cells in rows)]
    return Sheet(
        tuple(heads[i] for i in filled),
        sum(1 for i in filled if i <= len(separate)),
        tuple(tuple(cells[i] for i in filled) for cells in rows),
        numbers,
        (UNSAID + ", ".join(f"{k}={v}" for k, v in usual.items()),) if usual else (),
    )


def legend(sheet: Sheet, baseline: str = "") -> list[str]:
    """The sentences of the signs that the table has, then its notes. `baseline`: its name."""
    shown = " ".join(
        f"{cell.text} {cell.note} {'**' * cell.bold} {LEVEL * cell.level}"
        for cells in sheet.rows
        for cell in cells
    )
    sentences = [text.format(baseline=baseline) for sign, text in SIGNS.items() if sign in shown]
    return [*sentences, *sheet.notes]


def number(value: float, of: float | None = None, digits: int = 2, below: int = 4) -> str:
    """`digits` decimals, `below` of them below 1, an exponent from 10^4; empty for NaN.

    `of`: the number whose error `value` is; the error gets the decimals of that number.
    """
    size = abs(value if of is None else of)
    if math.isnan(value):
        return ""
    if size >= 1e4 or abs(value) >= 1e4:
        return f"{value:.2e}"
    if size >= 1:
        return f"{value:.{digits}f}"
    return f"{value:.{below}f}" if value or of is not None else "0"


def spread(setting: Setting, column: Column, digits: int | None = None) -> str:
    """A mean with its deviation over seeds, `33.60 ± 0.40 (3)`, or the number of the only seed with
    its standard error, `33.60 (se 1.99)`. `digits`: decimals; by size if None."""
    values = setting.spread(column)
    if not values.count:
        return ""
    usual, below = (3 if column.name.endswith("/ratio") else 2), 4
    if digits is not None:
        usual = below = digits
    text = number(values.mean, digits=usual, below=below)
    error = setting.error(column) if values.count == 1 else values.deviation
    around = number(error, of=values.mean, digits=usual, below=below)
    if values.count == 1:
        return text + (f" (se {around})" if around else "")
    return text + (f" ± {around}" if around else "") + f" ({values.count})"


def said(difference: Difference) -> str:
    """A difference and, if it was tested, its interval; in percent where it is relative."""
    text = f"Δ {signed(difference)}"
    if difference.tested:
        ends = (replace(difference, change=end) for end in (difference.low, difference.high))
        text += f" [{', '.join(map(signed, ends))}]"
    return text


def signed(difference: Difference) -> str:
    """The estimate of a difference with its sign."""
    change = difference.change
    if difference.relative:
        return f"{change:+.1%}"
    return ("+" if change > 0 else "-" if change < 0 else "") + number(abs(change))


def _cell(setting: Setting, column: Column, baseline: Setting | None, style: Style) -> Cell:
    difference = compare(setting, baseline, column) if baseline is not None else None
    note = said(difference) if difference is not None else ""
    value = setting.spread(column).mean
    return Cell(spread(setting, column, style.digits), value, note=note, setting=setting)


def _cost(name: str, settings: Sequence[Setting], numbers: Mapping[int, int]) -> Cell:
    """What the settings of a row took together, or the numbers of their runs."""
    if name == "run":
        marks = [f"{numbers[id(setting)]}{RECORD * setting.recorded}" for setting in settings]
        return Cell(", ".join(marks))
    if name == "seconds":
        seconds = sum(setting.seconds for setting in settings)
        return Cell(_plain(seconds, 0 if seconds >= 10 else 1), seconds)
    kind = {"memory GB": "rss", "cuda GB": "cuda"}[name]
    peak = max((p for s in settings if (p := s.peak(kind)) == p), default=math.nan)
    return Cell(_plain(peak, 2), peak)


def _above(table: Table, place: Sequence[str], style: Style) -> str:
    """The labels of the column keys; a label of the style needs no key."""
    words = []
    for key, value in zip(table.column_keys, place, strict=True):
        name = style.title(key, key.rpartition(".")[2])
        label = style.label(key, value)
        words.append(label if label != value else f"{name}={value or 'none'}")
    return ", ".join(words)


def _usual(table: Table) -> dict[str, str]:
    """For keys in the shared column, the value of more than half of the rows with such a key."""
    usual: dict[str, str] = {}
    for key in table.together:
        at = table.row_keys.index(key)
        counts = Counter(row.labels[at] for row in table.rows if row.labels[at])
        for value, count in counts.items():
            if 2 * count > counts.total():
                usual[key] = value
    return usual


def _rest(table: Table, row: Row, separate: Sequence[int], usual: Mapping[str, str]) -> str:
    """The shared column: unusual values, and those that distinguish rows with the same labels."""
    words = next(iter(row.cells.values())).words([*table.row_keys, *table.column_keys])
    shown = []
    alike = [each for each in table.rows if all(each.labels[i] == row.labels[i] for i in separate)]
    for at, key in enumerate(table.row_keys):
        label, distinguishes = row.labels[at], len({each.labels[at] for each in alike}) > 1
        if key in table.together and label and (distinguishes or label != usual.get(key)):
            shown.append(words[key])
    return ", ".join(shown)


def _plain(value: float, decimals: int) -> str:
    return "" if math.isnan(value) else f"{value:.{decimals}f}"
