"""Report of run folders: an HTML page, tables (Markdown, CSV, LaTeX) and a plot."""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path

from qexp.common.errors import UserError
from qexp.common.files import atomic
from qexp.report import edges, html, plots, tables
from qexp.report.pivot import SEED, Setting, Table, group, pivot
from qexp.report.significance import counterparts, effect
from qexp.runs.finished import Run, collect

STORED = (
    "The checkpoint of model={model} is stored quantized ({types}). Its weights lie on these grids "
    "already, so rounding to a grid that contains them is lossless by construction (Q4_1: 4 bits "
    "with real zero points in groups of 32 columns), and gaps to float are not those of a float "
    "checkpoint."
)
OUT = Path("outputs")
FILES = ("report.html", "table.md", "table.csv", "table.tex", "bits_vs_ppl.png")


def write(
    table: Table,
    baselines: Mapping[int, Setting],
    legend: Sequence[str],
    out: Path,
    notes: Sequence[str] = (),
    x: str = "weight/bits",
) -> str:
    """Writes FILES to the folder `out`; returns the Markdown table."""
    sheet = tables.lay(table, baselines)
    legend = [*legend, *sheet.notes, *stored(table.settings)]
    markdown = tables.markdown(sheet)
    commands = "\n".join(
        f"{sheet.numbers[id(setting)]}. `{setting.run.command}`: "
        + ", ".join(f"`{run.folder}`" + " (record)" * run.recorded for run in setting.runs)
        for setting in table.settings
    )
    texts = {
        "table.md": "\n\n".join([markdown, *legend, commands]) + "\n",
        "table.csv": tables.spreadsheet(table, baselines),
        "table.tex": tables.latex(sheet) + "\n",
        "report.html": html.page(table, sheet, legend, notes, x),
    }
    for name, text in texts.items():
        with atomic(out / name) as path:
            path.write_text(text, encoding="utf-8")
    columns = [column for column in table.columns if column.is_perplexity]
    plots.against_bits(table.settings, columns, x).png(out / "bits_vs_ppl.png")
    return markdown


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
        raise UserError(f"{names}: no finished run stands there; run `qexp` first")
    for option in ("rows", "columns", "over"):
        _known(runs, option, _words(getattr(chosen, option)))
    settings = group(runs, _words(chosen.over) or SEED)
    table = pivot(settings, _words(chosen.rows) or None, _words(chosen.columns))
    table = select(table, _words(chosen.metrics))
    legend, baselines = [tables.LEGEND], {}
    if chosen.baseline:
        against = _pairs(chosen.baseline)
        baselines = counterparts(settings, against)
        legend.append(tables.AGAINST.format(baseline=chosen.baseline))
        legend += effects(table, baselines, list(against))
    if chosen.chosen:
        best = edges.chosen(table, chosen.chosen)
        print("\n".join(best) + "\n")
        legend += best
    out = chosen.out or default_out(chosen.folders[0], runs)
    print(write(table, baselines, legend, out, notes, chosen.x))
    print("\n" + ", ".join([str(out / FILES[0]), *FILES[1:]]))


def default_out(first: Path, runs: Sequence[Run]) -> Path:
    """The first folder that was named, unless it holds records only: those are committed."""
    inside = [run for run in runs if run.folder.is_relative_to(first)]
    return OUT if all(run.recorded for run in inside) else first


def effects(table: Table, baselines: Mapping[int, Setting], keys: Sequence[str]) -> list[str]:
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
            if moved is not None and moved.p == moved.p:
                said.append(
                    f"{column.title}, {words}: over {len(found)} rows, averaged within each of "
                    f"{moved.count} seeds, {moved.interval(column)}, p {moved.p:.2g}."
                )
    return said


def select(table: Table, patterns: Sequence[str]) -> Table:
    """The table with only the metrics that match a pattern; all metrics without patterns.

    Raises UserError if no metric matches.
    """
    if not patterns:
        return table
    names = [column.name for column in table.columns]
    kept = [c for c in table.columns if any(fnmatchcase(c.name, each) for each in patterns)]
    if not kept:
        raise UserError(f"--metrics {','.join(patterns)}: none fits; there are {', '.join(names)}")
    return replace(table, columns=tuple(kept))


def _words(text: str | None) -> list[str]:
    return [word for word in (text or "").split(",") if word]


def _known(runs: Sequence[Run], option: str, keys: Sequence[str]) -> None:
    """Raises UserError for a key that no run has: every cell would be empty."""
    there = {key for run in runs for key in (*run.choices, *run.leaves)}
    for key in keys:
        if key not in there:
            near = ", ".join(get_close_matches(key, there)) or "weight.bits, method, seed"
            raise UserError(f"--{option} {key}: no run has this key; perhaps {near}")


def _pairs(text: str) -> dict[str, str]:
    pairs = [word.partition("=") for word in _words(text)]
    if not all(equals for _, equals, _ in pairs):
        raise UserError(f"--baseline {text}: is not key=value; give for example method=rtn")
    return {key: value for key, _, value in pairs}
