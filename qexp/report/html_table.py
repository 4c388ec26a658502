"""Table of settings as HTML."""

import re
from collections.abc import Sequence
from html import escape
from itertools import groupby

from qexp.report import tables
from qexp.report.pivot import Table


def table(table: Table, sheet: tables.Sheet) -> str:
    """The `<table>` of a sheet: a button in each head sorts, one in each row opens its details."""
    above = ""
    if any(head for head, _ in sheet.heads):
        groups = [(head, len(list(cells))) for head, cells in groupby(h for h, _ in sheet.heads)]
        above = "".join(
            f'<th colspan="{count}"{" class=above" if head else ""}>{escape(head)}</th>'
            for head, count in groups
        )
        above = f"<tr>{above}</tr>"
    metrics = {column.title: column for column in table.columns}
    titles = ""
    for at, (_, title) in enumerate(sheet.heads):
        if at < sheet.labels:
            choice = "" if title == tables.TOGETHER else f' data-choice="{escape(title)}"'
            kind = f' class="label"{choice}'
        else:
            kind = ' class="number"'
        small = ""
        if (column := metrics.get(title)) is not None:
            protocol, _, name = column.name.rpartition("/")
            digest = f"<br>[{escape(column.digest)}]" if column.digest else ""
            title, small = name, f"<small>{_breakable(protocol)}{digest}</small>"
        titles += (
            f'<th{kind} scope="col" aria-sort="none"><button type="button" class="sort">'
            f"{_breakable(title)}</button>{small}</th>"
        )
    rows = "".join(f"<tr>{_row(sheet, cells)}</tr>\n" for cells in sheet.rows)
    empty = f'<tr id="none" hidden><td colspan="{len(sheet.heads)}" class="empty">No row has it.'
    return (
        f'<table id="table"><thead>{above}<tr>{titles}</tr></thead><tbody>\n{rows}</tbody>'
        f"<tfoot>{empty}</td></tr></tfoot></table>"
    )


def _row(sheet: tables.Sheet, cells: Sequence[tables.Cell]) -> str:
    first = escape(cells[0].text) or "(none)"
    parts = [
        f'<th scope="row"><button type="button" class="row" aria-expanded="false" tabindex="-1">'
        f"{first}</button></th>"
    ]
    for at, cell in enumerate(cells[1:], 1):
        if at < sheet.labels:
            words = ' class="words"' if sheet.titles[at] == tables.TOGETHER else ""
            parts.append(f"<td{words}>{escape(cell.text)}</td>")
            continue
        classes = ["number"] + ["best"] * cell.bold + ["level"] * cell.level
        value = f' data-value="{cell.value}"' if cell.value == cell.value else ""
        text = escape(cell.text)
        if cell.setting is not None and cell.text:
            number, error = _split(cell.text)
            text = f'<span class="mean">{escape(number)}</span>'
            text += f'<span class="error">{escape(error)}</span>'
            text += f"<sup>{tables.LEVEL}</sup>" * cell.level
        note = f"<small>{escape(cell.note)}</small>" if cell.note else ""
        parts.append(f'<td class="{" ".join(classes)}"{value}>{text}{note}</td>')
    return "".join(parts)


def _breakable(title: str) -> str:
    """A title that may be wrapped after `/`, `_` and `.`."""
    return re.sub(r"([/_.])", r"\1<wbr>", escape(title))


def widths(sheet: tables.Sheet) -> str:
    """Widths of the errors of each column, so that the numbers before them are aligned."""
    rules = []
    for at in range(sheet.labels, len(sheet.heads)):
        longest = max((len(_split(cells[at].text)[1]) for cells in sheet.rows), default=0)
        if longest:
            rules.append(f"#table td:nth-child({at + 1}) .error {{ min-width: {longest}ch }}")
    return "\n".join(rules)


def _split(text: str) -> tuple[str, str]:
    """A number, and what follows it: its error and the number of seeds."""
    number, space, rest = text.partition(" ")
    return number, space + rest
