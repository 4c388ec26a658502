"""Tables of settings as Markdown, LaTeX and CSV."""

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qexp.report.pivot import Row, Setting, Table
from qexp.report.significance import NEAR, Difference, best, compare
from qexp.runs.finished import Column

LEGEND = (
    "± is the standard error over what was evaluated; ± … (n) is the deviation over n seeds around "
    f"their mean. The best of a column among several settings within {NEAR} bits of it is bold."
)
RECORD = "ʳ"  # after the number of a setting
RECORDED = f"{RECORD}: read from a record, which was committed; the run's folder is not here."
TOGETHER = "settings"
UNSAID = f"Values that the column {TOGETHER} omits, for settings with such a key: "
AGAINST = (
    "Δ is the difference from {baseline} over shared seeds, p that of a paired t-test "
    "(on logarithms for perplexities; not corrected for multiple tests)."
)


class Cell(NamedTuple):
    """The content of one cell; `value` is its sort key."""

    text: str
    value: float = math.nan
    bold: bool = False
    note: str = ""
    setting: Setting | None = None


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


def lay(table: Table, baselines: Mapping[int, Setting]) -> Sheet:
    """Labels, then bits and metrics for each label of the column keys, costs and run numbers.

    `baselines`: by id of the setting that is compared with it. Empty columns are removed.
    """
    numbers = {id(setting): number for number, setting in enumerate(table.settings, 1)}
    bold = best(table)
    places = [(_above(table, place), place) for place in table.places]
    separate = [i for i, key in enumerate(table.row_keys) if key not in table.together]
    heads = [("", table.row_keys[i]) for i in separate] + [("", TOGETHER)]
    usual = _usual(table)
    for above, _ in places:
        heads += [(above, "bits"), *((above, column.title) for column in table.columns)]
    heads += [("", title) for title in ("seconds", "memory GB", "cuda GB", "run")]
    rows = []
    for row in table.rows:
        cells = [*(Cell(row.labels[i]) for i in separate), Cell(_rest(table, row, separate, usual))]
        for _, place in places:
            if (setting := row.cells.get(place)) is None:
                cells += [Cell("")] * (1 + len(table.columns))
                continue
            cells.append(Cell(_plain(setting.bits, 2), setting.bits))
            for column in table.columns:
                marked = (id(setting), column) in bold
                cells.append(_cell(setting, column, marked, baselines.get(id(setting))))
        settings = list(row.cells.values())
        seconds = sum(setting.seconds for setting in settings)
        cells.append(Cell(_plain(seconds, 0 if seconds >= 10 else 1), seconds))
        for kind in ("rss", "cuda"):
            peak = max((p for s in settings if (p := s.peak(kind)) == p), default=math.nan)
            cells.append(Cell(_plain(peak, 2), peak))
        marks = [f"{numbers[id(setting)]}{RECORD * setting.recorded}" for setting in settings]
        cells.append(Cell(", ".join(marks)))
        rows.append(cells)
    filled = [i for i in range(len(heads)) if any(cells[i].text for cells in rows)]
    return Sheet(
        tuple(heads[i] for i in filled),
        sum(1 for i in filled if i <= len(separate)),
        tuple(tuple(cells[i] for i in filled) for cells in rows),
        numbers,
        (UNSAID + ", ".join(f"{k}={v}" for k, v in usual.items()),) * bool(usual)
        + (RECORDED,) * any(setting.recorded for setting in table.settings),
    )


def markdown(sheet: Sheet) -> str:
    """A Markdown table with aligned columns, so that it is readable in a terminal."""
    lines = [sheet.titles]
    for cells in sheet.rows:
        texts = [
            _joined(f"**{cell.text}**" if cell.bold else cell.text, cell.note) for cell in cells
        ]
        lines.append([text.replace("|", "\\|") for text in texts])
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(sheet.heads))]
    rule = "|".join(
        "-" * (width + 1) + ("-" if i < sheet.labels else ":") for i, width in enumerate(widths)
    )
    shown = [
        " | ".join(
            text.ljust(width) if i < sheet.labels else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([f"| {shown[0]} |", f"|{rule}|", *(f"| {line} |" for line in shown[1:])])


def latex(sheet: Sheet) -> str:
    """A LaTeX `tabular` for the package booktabs."""
    align = "".join("l" if i < sheet.labels else "r" for i in range(len(sheet.heads)))
    lines = [f"\\begin{{tabular}}{{{align}}}", "\\toprule"]
    lines.append(" & ".join(_tex(title) for title in sheet.titles) + r" \\")
    lines.append("\\midrule")
    for cells in sheet.rows:
        texts = []
        for cell in cells:
            text = _tex(cell.text)
            texts.append(_joined(f"\\textbf{{{text}}}" if cell.bold else text, _tex(cell.note)))
        lines.append(" & ".join(texts) + r" \\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"])


def spreadsheet(table: Table, baselines: Mapping[int, Setting]) -> str:
    """CSV with a line per setting: all of its numbers, its command and its folders."""
    lines = list(_numbers(table, baselines))
    file = io.StringIO()
    writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


def number(value: float, of: float | None = None, digits: int = 2) -> str:
    """`digits` decimals, four below 1, an exponent from 10^4; empty for NaN.

    `of`: the number whose error `value` is; the error gets the decimals of that number.
    """
    size = abs(value if of is None else of)
    if math.isnan(value):
        return ""
    if size >= 1e4 or abs(value) >= 1e4:
        return f"{value:.2e}"
    return (
        f"{value:.{digits}f}" if size >= 1 else f"{value:.4f}" if value or of is not None else "0"
    )


def spread(setting: Setting, column: Column) -> str:
    """A mean with its deviation over seeds, or with the standard error of the only seed."""
    values = setting.spread(column)
    if not values.count:
        return ""
    error = setting.error(column) if values.count == 1 else values.deviation
    digits = 3 if column.name.endswith("/ratio") else 2
    text = number(values.mean, digits=digits)
    if not math.isnan(error):
        text += f" ± {number(error, of=values.mean, digits=digits)}"
    return text + (f" ({values.count})" if values.count > 1 else "")


def said(difference: Difference) -> str:
    """A difference, and its p value if there is one."""
    sign = "+" if difference.mean > 0 else "-" if difference.mean < 0 else ""
    text = f"Δ {sign}{number(abs(difference.mean))}"
    return text if math.isnan(difference.p) else f"{text}, p {difference.p:.2g}"


def _cell(setting: Setting, column: Column, bold: bool, baseline: Setting | None) -> Cell:
    difference = compare(setting, baseline, column) if baseline is not None else None
    note = said(difference) if difference is not None else ""
    value = setting.spread(column).mean
    return Cell(spread(setting, column), value, bold, note, setting)


def _numbers(table: Table, baselines: Mapping[int, Setting]) -> Iterator[dict[str, object]]:
    for row in table.rows:
        for place, setting in row.cells.items():
            line: dict[str, object] = dict(zip(table.row_keys, row.labels, strict=True))
            line |= dict(zip(table.column_keys, place, strict=True))
            line["bits"] = setting.bits
            baseline = baselines.get(id(setting))
            for column in table.columns:
                values, title = setting.spread(column), column.title
                line |= {title: values.mean, f"{title} stderr": setting.error(column)}
                line |= {f"{title} deviation": values.deviation, f"{title} seeds": values.count}
                if baselines:
                    moved = compare(setting, baseline, column) if baseline is not None else None
                    line[f"{title} difference"] = moved.mean if moved is not None else math.nan
                    line[f"{title} p"] = moved.p if moved is not None else math.nan
            line |= {"seconds": setting.seconds, "memory GB": setting.peak("rss")}
            line |= {"cuda GB": setting.peak("cuda"), "command": setting.run.command}
            yield line | {"folders": " ".join(str(run.folder) for run in setting.runs)}


def _above(table: Table, place: Sequence[str]) -> str:
    pairs = zip(table.column_keys, place, strict=True)
    return ", ".join(f"{key.rpartition('.')[2]}={label or 'none'}" for key, label in pairs)


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


def _joined(text: str, note: str) -> str:
    return f"{text} ({note})" if note else text


def _plain(value: float, decimals: int) -> str:
    return "" if math.isnan(value) else f"{value:.{decimals}f}"


def _tex(text: str) -> str:
    text = re.sub(r"([&%$#_{}])", r"\\\1", text.replace("\\", r"\textbackslash "))
    symbols = {"±": r"$\pm$", "Δ": r"$\Delta$"}
    return "".join(symbols.get(letter, letter) for letter in text)
