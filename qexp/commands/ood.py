"""In- and out-of-distribution evaluation: one corpus for training, many for tests (2211.16912).

F-ID is the perplexity on the corpus of calibration or training, relative to the float model's.
F-OOD is the geometric mean of these ratios on all other corpora.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qexp.commands.report import OUT, default_out
from qexp.common.errors import UserError
from qexp.common.files import atomic
from qexp.report import formats, pivot, tables
from qexp.runs.finished import Column, Run, collect

ROWS = ("model", "data", "transform", "method", "method/trained", "ranges", "width", "trained on")
FORMS = {"wikitext2_tokens": "wikitext2"}  # two forms of one text are one distribution
LEGEND = (
    "F-ID: ratio of perplexity to the float model's on the corpus of calibration and training; "
    "F-OOD: geometric mean of the ratios on the others."
)


def measured(runs: Sequence[Run]) -> list[Run]:
    """The runs with F-ID and F-OOD as metrics, and with the table's row labels as choices.

    Raises UserError for a run if there is no float run of its model with the same protocols.
    """
    floats: dict[tuple[str, Column], list[float]] = {}
    for run in runs:
        for column in run.columns if run.is_float else ():
            floats.setdefault((_model(run), column), []).append(run.metrics[column.name])
    return [_with_ratios(run, floats) for run in runs]


def table(runs: Sequence[Run]) -> pivot.Table:
    """Settings by the keys that distinguish them; seeds are averaged, metrics are columns."""
    settings = pivot.group(measured(runs))

    def distinct(keys: Sequence[str]) -> int:
        return len({tuple(setting.label(key) for key in keys) for setting in settings})

    rows = [key for key in ROWS if distinct([key]) > 1]
    for key in pivot.differing(settings):
        if distinct([*rows, key]) > distinct(rows):
            rows.append(key)
    return pivot.pivot(settings, rows or ["method"])


def main(arguments: Sequence[str]) -> None:
    """The command line of `qexp ood`."""
    parser = argparse.ArgumentParser(prog="qexp ood", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="of runs, of sweeps or of records")
    parser.add_argument("--out", type=Path, help=f"the first folder by default; {OUT} for records")
    chosen = parser.parse_args(arguments)
    runs, notes = collect(chosen.folders)
    for note in notes:
        print(note, file=sys.stderr)
    if not runs:
        raise UserError(f"{chosen.folders[0]}: no finished run is there; run qexp first")
    made = table(runs)
    sheet = tables.lay(made, {})
    text = "\n\n".join([formats.markdown(sheet), LEGEND, *tables.legend(sheet)]) + "\n"
    out = chosen.out or default_out(chosen.folders[0], runs)
    for name, content in (("md", text), ("csv", formats.spreadsheet(made, {}))):
        with atomic(out / f"ood.{name}") as path:
            path.write_text(content, encoding="utf-8")
    print(text)


def _with_ratios(run: Run, floats: dict[tuple[str, Column], list[float]]) -> Run:
    inside: list[float] = []
    outside: list[float] = []
    for column in run.columns:
        if not column.is_perplexity:
            continue
        known = floats.get((_model(run), column))
        if known is None:
            raise UserError(
                f"{run.folder}: nothing to compare {column.title} with; run the float model with "
                "the same protocols: method=none activation=none transform=none"
            )
        ratio = run.metrics[column.name] / statistics.fmean(known)
        own = _text(_corpus(run, column)) == _text(run.config["data"]["name"])
        (inside if own else outside).append(ratio)
    ratios = {"F-ID/ratio": inside, "F-OOD/ratio": outside}
    means = {name: _geometric(found) for name, found in ratios.items() if found}
    words = {"width": _width(run), "ranges": _ranges(run), "trained on": _share(run)}
    return replace(run, metrics=run.metrics | means, choices=run.choices | words)


def _geometric(ratios: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, ratios)))


def _corpus(run: Run, column: Column) -> str:
    protocol = run.provenance["protocols"][column.name.rpartition("/")[0]]
    return str(protocol["definition"]["corpus"]["name"])


def _text(corpus: str) -> str:
    return FORMS.get(corpus, corpus)


def _model(run: Run) -> str:
    return repr(sorted(run.config["model"].items(), key=str))


def _width(run: Run) -> str:
    weight = f"W{run.config['weight']['bits']}" if "weight/bits" in run.metrics else ""
    grid = run.config["activation"].get("grid") or {}
    return weight + (f"A{grid['bits']}" if "bits" in grid else "") or "float"


def _ranges(run: Run) -> str:
    return run.choices.get("activation/grid/range", "")


def _share(run: Run) -> str:
    """The share of the corpus or the number of windows; empty without training data."""
    method: dict[str, Any] = run.config["method"]
    recipe = (method.get("training") or method).get("train")
    if not recipe:
        return ""
    share = recipe.get("share")
    return f"{recipe['sequences']} windows" if share is None else f"{100 * share:g} %"
