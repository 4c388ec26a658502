"""From run folders to one table: every row a run, every perplexity under its own definition."""

import argparse
import csv
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from qexp.errors import UserError
from qexp.files import atomic
from qexp.runs import Run, collect


def table(runs: Sequence[Run]) -> list[dict[str, str | float]]:
    """One dict per run with the same keys in each; a number that is not there is NaN."""
    columns = list(dict.fromkeys(column for run in runs for column in run.columns))
    rows: list[dict[str, str | float]] = []
    for run in runs:
        row: dict[str, str | float] = {
            "model": run.choices.get("model", "?"),
            "data": run.choices.get("data", "?"),
            "method": run.choices.get("method", "?"),
            "weight": run.weight,
            "activation": run.choices.get("activation", "none"),
            "other": run.other,
            "bits": run.metrics.get("weight/bits", math.nan),
        }
        for column in columns:
            own = column in run.columns
            for name, title in (
                (column.name, column.title),
                (f"{column.name}_stderr", f"{column.title} stderr"),
            ):
                row[title] = run.metrics.get(name, math.nan) if own else math.nan
        row["seconds"] = run.seconds
        row["memory GB"] = run.peak("rss")
        row["cuda GB"] = run.peak("cuda")
        row["folder"] = str(run.folder)
        rows.append(row)
    return rows


def markdown(rows: Sequence[dict[str, str | float]]) -> str:
    """The table for people: a value and its standard error share a cell, empty columns go."""
    titles = [
        title
        for title in rows[0]
        if not title.endswith(" stderr") and any(_text(row, title) for row in rows)
    ]
    cells = [titles, *([_text(row, title) for title in titles] for row in rows)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(titles))]
    numeric = [isinstance(rows[0][title], float) for title in titles]
    lines = [
        "| "
        + " | ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        )
        + " |"
        for line in cells
    ]
    rule = "|".join(
        "-" * (width + 1) + (":" if right else "-")
        for width, right in zip(widths, numeric, strict=True)
    )
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])


def write(runs: Sequence[Run], out: Path, x: str = "weight/bits") -> str:
    """Write table.md, table.csv and bits_vs_ppl.png; the value is the table for people."""
    from qexp import plot

    rows = table(runs)
    text = markdown(rows)
    with atomic(out / "table.md") as path:
        path.write_text(text + "\n", encoding="utf-8")
    with (
        atomic(out / "table.csv") as path,
        path.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    plot.save(runs, out / "bits_vs_ppl.png", x)
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of `scripts/report.py`; the value is the exit code."""
    parser = argparse.ArgumentParser(prog="report", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="run folders, or folders of them")
    parser.add_argument("--out", type=Path, help="where to write; the first folder by default")
    parser.add_argument("--x", default="weight/bits", help="metric or config key of the x axis")
    chosen = parser.parse_args(arguments)
    try:
        runs, notes = collect(chosen.folders)
        for note in notes:
            print(note, file=sys.stderr)
        if not runs:
            names = ", ".join(str(folder) for folder in chosen.folders)
            raise UserError(f"{names}: no finished run stands there; run `qexp` first")
        out = chosen.out or chosen.folders[0]
        print(write(runs, out, chosen.x))
        print(f"\n{out}/table.md, table.csv, bits_vs_ppl.png")
    except UserError as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    return 0


def _text(row: dict[str, str | float], title: str) -> str:
    value = row[title]
    if isinstance(value, str):
        return "" if title == "activation" and value == "none" else value
    if math.isnan(value):
        return ""
    if title == "seconds":
        return f"{value:.0f}" if value >= 10 else f"{value:.1f}"
    error = row.get(f"{title} stderr", math.nan)
    shown = _number(value)
    if isinstance(error, float) and not math.isnan(error):
        shown += f" ± {_number(error)}"
    return shown


def _number(value: float) -> str:
    """Two decimals as papers print perplexities; powers of ten once nobody would read them."""
    return f"{value:.2f}" if abs(value) < 1e4 else f"{value:.2e}"
