"""Perplexity against bits, as a picture."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qexp.files import atomic
from qexp.runs import Column, Run

# Okabe and Ito: told apart with any colour vision, and by their markers in grey
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LONGEST = 24  # letters of a name that has room beside its line
GREY = "#666666"


def save(runs: Sequence[Run], path: Path, x: str = "weight/bits") -> None:
    """A panel for each model and data under each definition of perplexity."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # needs no screen
    from matplotlib.figure import Figure

    panels = _panels(runs)
    across = min(len(panels), 3) or 1
    down = math.ceil(len(panels) / across) or 1
    figure = Figure(figsize=(6.4 * across, 4.4 * down), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    for index, (column, subject, members) in enumerate(panels):
        axes = figure.add_subplot(down, across, index + 1)
        _panel(axes, column, members, x)
        axes.set_title(subject, loc="left", fontsize=11)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png")


def _panels(runs: Sequence[Run]) -> list[tuple[Column, str, list[Run]]]:
    found: dict[tuple[Column, str], list[Run]] = {}
    for run in runs:
        subject = f"{run.choices.get('model', '?')}, calibrated on {run.choices.get('data', '?')}"
        for column in run.columns:
            if column.name.endswith("/ppl"):
                found.setdefault((column, subject), []).append(run)
    return [(column, subject, members) for (column, subject), members in found.items()]


def _panel(axes: Any, column: Column, runs: Sequence[Run], x: str) -> None:
    labels: list[tuple[float, float, str, str]] = []
    for index, (name, members) in enumerate(_series(runs).items()):
        points = sorted((run.value(x), run.metrics[column.name], run) for run in members)
        points = [p for p in points if math.isfinite(p[0]) and math.isfinite(p[1])]
        if not points:
            continue
        colour = COLOURS[index % len(COLOURS)]
        spread = [run.metrics.get(f"{column.name}_stderr", 0.0) for _, _, run in points]
        axes.errorbar(
            [at for at, _, _ in points],
            [ppl for _, ppl, _ in points],
            yerr=[value if math.isfinite(value) else 0.0 for value in spread],
            color=colour,
            marker=MARKERS[index % len(MARKERS)],
            markersize=7,
            markeredgecolor="white",  # points of lines that meet stay apart
            linewidth=1.8,
            elinewidth=1,
            capsize=2,
            label=name,
        )
        labels.append((points[0][0], points[0][1], name, colour))
    baselines = [run.metrics[column.name] for run in runs if run.is_float]
    for ppl in sorted(set(baselines)):
        axes.axhline(ppl, color=GREY, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
        note = axes.annotate(
            f"float {ppl:.2f}",
            (0, ppl),  # at the left the lines are far above
            xycoords=("axes fraction", "data"),
            xytext=(4, 3),
            textcoords="offset points",
        )
        note.set(ha="left", va="bottom", color=GREY, fontsize=9)
    axes.set_yscale("log")
    _plain_ticks(axes)
    _label(axes, labels)
    axes.set_xlabel("bits per weight, measured" if x == "weight/bits" else x)
    axes.set_ylabel(f"perplexity, {column.title.replace('/ppl', '')}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", which="major", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)


def _series(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ in bits alone form a line; its name says what differs between lines."""
    traits = {}
    for run in runs:
        if not run.is_float:
            grid = [word for word in run.weight.split() if not word.isdigit()]
            groups = [run.choices.get(group, "none") for group in ("activation", "kv", "transform")]
            traits[id(run)] = (run.choices.get("method", "?"), " ".join(grid), *groups, run.other)
    varies = [len(set(values)) > 1 for values in zip(*traits.values(), strict=True)]
    series: dict[str, list[Run]] = {}
    for run in runs:
        if id(run) in traits:
            method, *others = traits[id(run)]
            kept = [word for word, many in zip(others, varies[1:], strict=True) if many]
            name = ", ".join([method, *(word for word in kept if word not in ("", "none"))])
            name = re.sub(r"[\w./]+\.(\w+=)", r"\1", name)  # the last part of a key says enough
            series.setdefault(name, []).append(run)
    return series


def _plain_ticks(axes: Any) -> None:
    """Numbers as a table prints them instead of powers of ten, and few of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_ylim()
    steps = (1.0, 2.0, 5.0) if high / low < 1e3 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=steps, numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _label(axes: Any, labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Names beside the low-bit ends of the lines, where those lie apart, pushed off each other."""
    if not labels:
        return
    longest = max(len(name) for _, _, name, _ in labels)
    if longest > LONGEST:  # would cover the lines
        axes.legend(frameon=False, fontsize=9)
        return
    low, high = axes.get_xlim()
    axes.set_xlim(low - (high - low) * min(0.5, 0.03 + 0.016 * longest), high)
    taken = -math.inf
    for x, y, name, colour in sorted(labels, key=lambda label: label[1]):
        height = math.log(y / axes.get_ylim()[0]) / math.log(
            axes.get_ylim()[1] / axes.get_ylim()[0]
        )
        shown = max(height, taken + 0.06)  # fractions of the axis; a line of text is about 0.05
        taken = shown
        at = axes.get_ylim()[0] * (axes.get_ylim()[1] / axes.get_ylim()[0]) ** shown
        note = axes.annotate(name, (x, at), xytext=(-8, 0), textcoords="offset points")
        note.set(ha="right", va="center", color=colour, fontsize=10, fontweight="bold")
