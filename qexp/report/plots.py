"""Plots of a metric against bits, with one line per method."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Line:
    """Quantized settings with one name and look.

    `place`: its number, which chooses its look. `front`: its settings differ in more than bits,
    so that only its Pareto front is connected.
    """

    name: str
    members: tuple[Setting, ...]
    place: int
    front: bool

    @property
    def colour(self) -> int:
        """An index of COLOURS."""
        return self.place % len(COLOURS)

    @property
    def marker(self) -> str:
        """One of MARKERS. 8 and 9 are coprime: a colour that is used again has another marker."""
        return MARKERS[self.place % len(MARKERS)]

    @property
    def look(self) -> dict[str, Any]:
        """The colour and the marker as arguments of matplotlib."""
        return {"color": COLOURS[self.colour], "marker": self.marker}


def against_bits(
    settings: Sequence[Setting],
    columns: Iterable[Column],
    x: str = "weight/bits",
) -> Picture:
    """One panel per metric, model and data; a method has the same colour and marker in all.

    `x`: a metric or a number of the configuration.
    """
    lines = series(settings, x)
    longest = max((len(line.name) for line in lines), default=0)
    label_lines = len(lines) <= MOST and longest <= LONGEST
    panels: list[tuple[Column, str, list[Setting]]] = []
    for column in columns:
        by_subject: dict[str, list[Setting]] = {}
        for setting in settings:
            if math.isfinite(setting.spread(column).mean):
                by_subject.setdefault(subject(setting), []).append(setting)
        panels += [(column, name, members) for name, members in by_subject.items()]
    # a panel with one setting compares nothing
    panels = [panel for panel in panels if len(panel[2]) > 1] or panels
    across = min(len(panels), 3) or 1
    down = math.ceil(len(panels) / across) or 1
    picture = Picture(figure(6.4 * across, 4.4 * down))
    for index, (column, name, members) in enumerate(panels):
        axes = picture.figure.add_subplot(down, across, index + 1)
        labels = _panel(axes, column, members, lines, x)
        protocol, _, key = column.name.rpartition("/")
        named = f"{protocol} [{column.digest}]" if column.digest else protocol
        axes.set_title(f"{named}\n{name}", loc="left", fontsize=10)
        axes.set_ylabel("perplexity" if key == "ppl" else key)
        if label_lines:
            _label(axes, labels)
    if lines and not label_lines:  # names would cover the lines, or each other
        from matplotlib.lines import Line2D

        shown = [Line2D([], [], **line.look, label=line.name) for line in lines]
        widest = longest * 0.075 + 0.6  # inches
        abreast = max(1, min(len(lines), int(6.4 * across / widest)))
        picture.figure.legend(
            handles=shown, loc="outside lower left", ncols=abreast, frameon=False, fontsize=9
        )
    return picture


def _panel(
    axes: Any,
    column: Column,
    settings: Sequence[Setting],
    lines: Sequence[Line],
    x: str,
) -> list[tuple[float, float, str, str]]:
    """Draws one panel. Returns x, y, name and colour of each line's end at the fewest bits."""
    labels: list[tuple[float, float, str, str]] = []
    front: list[tuple[float, float]] = []
    shown = set(map(id, settings))
    for each in lines:
        members = [setting for setting in each.members if id(setting) in shown]
        all_points = [(one.value(x), one.spread(column).mean, one) for one in members]
        points = sorted((p for p in all_points if math.isfinite(p[0])), key=lambda point: point[:2])
        if not points:
            continue
        front += [(at, value) for at, value, _ in points]
        line, colour = [point[:2] for point in points], COLOURS[each.colour]
        if each.front:
            line = pareto(line, column.higher)
        axes.plot(*zip(*line, strict=True), color=colour, lw=1.6)
        for at, value, setting in points:
            deviation, error = setting.spread(column).deviation, setting.error(column)
            if math.isfinite(deviation):
                axes.errorbar([at], [value], yerr=[deviation], color=colour, lw=1, capsize=2)
            elif math.isfinite(error):
                axes.errorbar([at], [value], yerr=[error], color=colour, lw=1)[2][0].set_ls(":")
            # white edges separate the points of lines that meet
            axes.plot([at], [value], **each.look, ms=7, mec="white", ls="", zorder=3)
        labels.append((points[0][0], points[0][1], each.name, colour))
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


def series(settings: Sequence[Setting], x: str) -> list[Line]:
    """Lines of quantized settings; a name consists of the values in which the lines differ."""
    quantized = [setting for setting in settings if not setting.run.is_float]
    keys = [key for key in differing(quantized) if key not in (*PANEL, "weight.bits", x)]
    for separating in (keys, [key for key in keys if key in FIRST]):
        named: dict[str, list[Setting]] = {}
        for setting in quantized:
            words = setting.words(list(dict.fromkeys(["method", *separating, "weight.bits"])))
            words.pop("weight.bits", None)  # asked for only so that other `bits` are named in full
            name = ", ".join(word for word in words.values() if word != "none")
            named.setdefault(name, []).append(setting)
        if len(named) <= CROWD:
            break
    return [
        Line(name, tuple(members), place, _vary(members, keys))
        for place, (name, members) in enumerate(named.items())
    ]


def subject(setting: Setting) -> str:
    """The name of the setting's panel."""
    return ", ".join(setting.label(key) for key in PANEL)


def _vary(settings: Sequence[Setting], keys: Sequence[str]) -> bool:
    """Whether settings of one panel differ in any of `keys`."""
    values: dict[str, set[tuple[str, ...]]] = {}
    for setting in settings:
        own = tuple(str(setting.run.settings.get(key)) for key in keys)
        values.setdefault(subject(setting), set()).add(own)
    return any(len(each) > 1 for each in values.values())


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
