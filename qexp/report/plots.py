"""Plots of a metric against bits, with one line per method."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from qexp.report.figure import Picture, figure
from qexp.report.pivot import FIRST, Setting, differing
from qexp.report.tables import number
from qexp.runs.finished import Column

# Okabe and Ito's palette for colour-blind readers, with grey instead of yellow
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"]
COLOURS += ["#000000", "#999999"]
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
LONGEST = 16  # letters: longer names go to the legend instead of next to the line
MOST = 6  # lines: with more of them all names go to the legend
CROWD = 10  # lines: with more of them only the main keys (FIRST) separate lines
GREY = "#666666"
PANEL = ("model", "data", "calibration")  # equal for all settings of a panel

BARS = (
    "Bars in the plots: with caps, the deviation over seeds; dotted, the standard error of one run."
)

Say = Callable[[Setting, Column], str]


def against_bits(
    settings: Sequence[Setting],
    columns: Iterable[Column],
    x: str = "weight/bits",
    say: Say = lambda setting, column: setting.run.command,
) -> Picture:
    """One panel per metric, model and data; a method has the same colour and marker in all.

    `x`: a metric or a number of the configuration. `say`: the tooltip of a point.
    """
    lines = _series(settings, x)
    label_lines = len(lines) <= MOST and max(map(len, lines), default=0) <= LONGEST
    panels: list[tuple[Column, str, list[Setting]]] = []
    for column in columns:
        by_subject: dict[str, list[Setting]] = {}
        for setting in settings:
            if math.isfinite(setting.spread(column).mean):
                subject = ", ".join(setting.label(key) for key in PANEL)
                by_subject.setdefault(subject, []).append(setting)
        panels += [(column, subject, members) for subject, members in by_subject.items()]
    # a panel with one setting compares nothing
    panels = [panel for panel in panels if len(panel[2]) > 1] or panels
    across = min(len(panels), 3) or 1
    down = math.ceil(len(panels) / across) or 1
    picture = Picture(figure(6.4 * across, 4.4 * down))
    for index, (column, subject, members) in enumerate(panels):
        axes = picture.figure.add_subplot(down, across, index + 1)
        labels = _panel(picture, axes, column, members, lines, x, say)
        protocol, _, key = column.name.rpartition("/")
        named = f"{protocol} [{column.digest}]" if column.digest else protocol
        axes.set_title(f"{named}\n{subject}", loc="left", fontsize=10)
        axes.set_ylabel("perplexity" if key == "ppl" else key)
        if label_lines:
            _label(axes, labels)
    if lines and not label_lines:  # names would cover the lines, or each other
        from matplotlib.lines import Line2D

        shown = [Line2D([], [], **look, label=name) for name, (look, _) in lines.items()]
        widest = max(map(len, lines)) * 0.075 + 0.6  # inches
        abreast = max(1, min(len(lines), int(6.4 * across / widest)))
        picture.figure.legend(
            handles=shown, loc="outside lower left", ncols=abreast, frameon=False, fontsize=9
        )
    return picture


def _panel(
    picture: Picture,
    axes: Any,
    column: Column,
    settings: Sequence[Setting],
    lines: Mapping[str, tuple[dict[str, Any], Sequence[Setting]]],
    x: str,
    say: Say,
) -> list[tuple[float, float, str, str]]:
    """Draws one panel. Returns x, y, name and colour of each line's end at the fewest bits."""
    labels: list[tuple[float, float, str, str]] = []
    front: list[tuple[float, float]] = []
    shown = set(map(id, settings))
    for name, (look, all_members) in lines.items():
        members = [setting for setting in all_members if id(setting) in shown]
        all_points = [(each.value(x), each.spread(column).mean, each) for each in members]
        points = sorted((p for p in all_points if math.isfinite(p[0])), key=lambda point: point[:2])
        if not points:
            continue
        front += [(at, value) for at, value, _ in points]
        line, colour = [point[:2] for point in points], look["color"]
        if set(differing(members)) - {*PANEL, "weight.bits", x}:
            line = pareto(line, column.higher)  # other keys vary too: connect only the best
        axes.plot(*zip(*line, strict=True), color=colour, lw=1.6)
        for at, value, setting in points:
            deviation, error = setting.spread(column).deviation, setting.error(column)
            if math.isfinite(deviation):
                axes.errorbar([at], [value], yerr=[deviation], color=colour, lw=1, capsize=2)
            elif math.isfinite(error):
                axes.errorbar([at], [value], yerr=[error], color=colour, lw=1)[2][0].set_ls(":")
            mark = picture.name(say(setting, column))
            # white edges separate the points of lines that meet
            axes.plot([at], [value], **look, ms=7, mec="white", ls="", gid=mark, zorder=3)
        labels.append((points[0][0], points[0][1], name, colour))
    best = pareto(front, column.higher)
    axes.plot(*zip(*best, strict=True), color="#dddddd", lw=7, zorder=0) if len(best) > 1 else None
    for value in sorted({s.spread(column).mean for s in settings if s.run.is_float}):
        axes.axhline(value, color=GREY, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
        note = axes.annotate(
            f"float {number(value)}",
            (0, value),  # the lines are far from the float line at the left
            xycoords=("axes fraction", "data"),
            xytext=(4, 3),
            textcoords="offset points",
        )
        note.set(ha="left", va="bottom", color=GREY, fontsize=9)
    if column.is_perplexity:
        axes.set_yscale("log")
        _plain_ticks(axes)
    axes.set_xlabel("bits per weight, measured" if x == "weight/bits" else x)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", which="major", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    return labels


def pareto(points: Iterable[tuple[float, float]], higher: bool) -> list[tuple[float, float]]:
    """The Pareto front of `(size, metric)`, in the order of size. `higher`: more is better."""
    front: list[tuple[float, float]] = []
    for at, value in sorted(points, key=lambda p: (p[0], -p[1] if higher else p[1])):
        if not front or (value > front[-1][1] if higher else value < front[-1][1]):
            front.append((at, value))
    return front


def _series(settings: Sequence[Setting], x: str) -> dict[str, tuple[dict[str, Any], list[Setting]]]:
    """Lines by name: their look and their settings, which are quantized and differ only in bits.

    A name consists of the values in which the lines differ.
    """
    quantized = [setting for setting in settings if not setting.run.is_float]
    keys = [key for key in differing(quantized) if key not in (*PANEL, "weight.bits", x)]
    for separating in (keys, [key for key in keys if key in FIRST]):
        series: dict[str, list[Setting]] = {}
        for setting in quantized:
            words = setting.words(list(dict.fromkeys(["method", *separating, "weight.bits"])))
            words.pop("weight.bits", None)  # asked for only so that other `bits` are named in full
            name = ", ".join(word for word in words.values() if word != "none")
            series.setdefault(name, []).append(setting)
        if len(series) <= CROWD:
            break
    # 8 and 9 are coprime, so a colour that is used again has another marker
    looks = [
        {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        for i in range(len(series))
    ]
    return {
        name: (look, members) for look, (name, members) in zip(looks, series.items(), strict=True)
    }


def _plain_ticks(axes: Any) -> None:
    """A few tick labels as decimal numbers instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_ylim()
    steps = [1, 2, 5] if high / low < 1e3 else [1]
    steps = [*range(1, 10)] if high / low < 4 else steps
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=steps, numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _label(axes: Any, labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Writes names to the left of the lines' low-bit ends, without overlap."""
    longest = max((len(name) for _, _, name, _ in labels), default=0)
    low, high = axes.get_xlim()
    room = 0.03 + 0.02 * longest  # fractions of the axis; a bold letter is about 0.02
    axes.set_xlim(low - (high - low) * room / (1 - room), high)
    taken = -math.inf
    for x, y, name, colour in sorted(labels, key=lambda label: label[1]):
        height = axes.transAxes.inverted().transform(axes.transData.transform((x, y)))[1]
        taken = max(height, taken + 0.06)  # fractions of the axis; a line of text is about 0.05
        note = axes.annotate(
            name,
            (x, taken),
            xycoords=("data", "axes fraction"),
            xytext=(-8, 0),
            textcoords="offset points",
        )
        note.set(ha="right", va="center", color=colour, fontsize=10, fontweight="bold")
