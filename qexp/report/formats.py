"""A table as Markdown, as LaTeX and as CSV."""

import csv
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping

from qexp.report.pivot import Setting, Table
from qexp.report.significance import compare, standing
from qexp.report.tables import LEVEL, Cell, Sheet


def markdown(sheet: Sheet) -> str:
    """A Markdown table with aligned columns, so that it is readable in a terminal."""
    lines = [sheet.titles]
    for cells in sheet.rows:
        texts = [_marked(cell, lambda text: f"**{text}**") for cell in cells]
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
        escaped = [cell._replace(text=_tex(cell.text), note=_tex(cell.note)) for cell in cells]
        texts = [
            _marked(cell, lambda text: rf"\textbf{{{text}}}", r"$^\dagger$") for cell in escaped
        ]
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


def _numbers(table: Table, baselines: Mapping[int, Setting]) -> Iterator[dict[str, object]]:
    ranks = standing(table)
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
                at = (id(setting), column)
                line[f"{title} standing"] = (
                    "best" if at in ranks.best else "level" if at in ranks.level else ""
                )
                if baselines:
                    moved = compare(setting, baseline, column) if baseline is not None else None
                    line[f"{title} difference"] = getattr(moved, "mean", math.nan)
                    for name in ("change", "low", "high", "p"):
                        line[f"{title} {name}"] = getattr(moved, name, math.nan)
            line |= {"seconds": setting.seconds, "memory GB": setting.peak("rss")}
            line |= {"cuda GB": setting.peak("cuda"), "command": setting.run.command}
            yield line | {"folders": " ".join(str(run.folder) for run in setting.runs)}


def _marked(cell: Cell, bold: Callable[[str], str], level: str = f" {LEVEL}") -> str:
    """The text of a cell with its marks, then its note."""
    text = (bold(cell.text) if cell.bold else cell.text) + (level if cell.level else "")
    return f"{text}, {cell.note}" if cell.note else text


def _tex(text: str) -> str:
    text = re.sub(r"([&%$#_{}])", r"\\\1", text.replace("\\", r"\textbackslash "))
    symbols = {"±": r"$\pm$", "Δ": r"$\Delta$"}
    return "".join(symbols.get(letter, letter) for letter in text)
