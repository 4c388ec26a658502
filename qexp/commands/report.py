"""Report of run folders: an HTML page, tables (Markdown, CSV, LaTeX) and a plot."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from qexp.common.errors import UserError
from qexp.common.files import atomic
from qexp.report import edges, formats, html, plots, tables
from qexp.report.pivot import SEED
from qexp.report.query import Answer, Query, ask, stored
from qexp.runs.finished import Run, collect

OUT = Path("outputs")
FILES = ("report.html", "table.md", "table.csv", "table.tex", "bits_vs_ppl.png")


def write(
    answer: Answer,
    said: Sequence[str],
    out: Path,
    notes: Sequence[str] = (),
    x: str = "weight/bits",
) -> str:
    """Writes FILES to the folder `out`; returns the Markdown table. `said`: more of the legend."""
    table, sheet = answer.table, tables.lay(answer.table, answer.baselines)
    legend = _legend(answer, sheet, said)
    markdown = formats.markdown(sheet)
    commands = "\n".join(
        f"{sheet.numbers[id(setting)]}. `{setting.run.command}`: "
        + ", ".join(f"`{run.folder}`" + " (record)" * run.recorded for run in setting.runs)
        for setting in table.settings
    )
    texts = {
        "table.md": "\n\n".join([markdown, *legend, commands]) + "\n",
        "table.csv": formats.spreadsheet(table, answer.baselines),
        "table.tex": formats.latex(sheet) + "\n",
        "report.html": html.page(table, sheet, legend, notes, x),
    }
    for name, text in texts.items():
        with atomic(out / name) as path:
            path.write_text(text, encoding="utf-8")
    columns = [column for column in table.columns if column.is_perplexity]
    plots.against_bits(table.settings, columns, x).png(out / "bits_vs_ppl.png")
    return markdown


def page(folders: Sequence[Path], query: Query, x: str = "weight/bits") -> str:
    """The HTML page of the finished runs in `folders`, for a site that holds it."""
    runs, notes = collect(folders)
    answer = ask(runs, query)
    sheet = tables.lay(answer.table, answer.baselines)
    return html.page(answer.table, sheet, _legend(answer, sheet), notes, x)


def _legend(answer: Answer, sheet: tables.Sheet, said: Sequence[str] = ()) -> list[str]:
    return [*answer.legend(sheet), plots.BARS, *said, *stored(answer.table.settings)]


def main(arguments: Sequence[str]) -> None:
    """The command line of `qexp report`."""
    parser = argparse.ArgumentParser(prog="qexp report", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="of runs, of sweeps or of records")
    parser.add_argument("--out", type=Path, help=f"the first folder by default; {OUT} for records")
    parser.add_argument("--rows", help="config keys, by commas; all that differ by default")
    parser.add_argument("--columns", help="config keys, by commas: weight.bits")
    parser.add_argument("--metrics", help="metrics, by commas, with * and ?: '*/ppl,*/acc'")
    parser.add_argument("--over", help="keys whose values are averaged over; seed by default")
    parser.add_argument("--baseline", help="what others are compared with: method=rtn")
    parser.add_argument("--chosen", help="key that was searched: its best value, and if at an end")
    parser.add_argument("--x", default="weight/bits", help="metric or config key of the x axis")
    chosen = parser.parse_args(arguments)
    runs, notes = collect(chosen.folders)
    for note in notes:
        print(note, file=sys.stderr)
    if not runs:
        names = ", ".join(str(folder) for folder in chosen.folders)
        raise UserError(f"{names}: no finished run is there; run `qexp` first")
    query = Query(
        rows=tuple(_words(chosen.rows)),
        columns=tuple(_words(chosen.columns)),
        metrics=tuple(_words(chosen.metrics)),
        over=tuple(_words(chosen.over)) or SEED,
        baseline=_pairs(chosen.baseline),
    )
    answer = ask(runs, query)
    best: list[str] = []
    if chosen.chosen:
        best = edges.chosen(answer.table, chosen.chosen)
        print("\n".join(best) + "\n")
    out = chosen.out or default_out(chosen.folders[0], runs)
    print(write(answer, best, out, notes, chosen.x))
    print("\n" + ", ".join([str(out / FILES[0]), *FILES[1:]]))


def default_out(first: Path, runs: Sequence[Run]) -> Path:
    """The first folder that was named, unless it holds records only: those are committed."""
    inside = [run for run in runs if run.folder.is_relative_to(first)]
    return OUT if all(run.recorded for run in inside) else first


def _words(text: str | None) -> list[str]:
    return [word for word in (text or "").split(",") if word]


def _pairs(text: str | None) -> dict[str, str]:
    pairs = [word.partition("=") for word in _words(text)]
    if not all(equals for _, equals, _ in pairs):
        raise UserError(f"--baseline {text}: is not key=value; give for example method=rtn")
    return {key: value for key, _, value in pairs}
