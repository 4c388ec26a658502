"""Pictures of settings: a metric against bits, and errors layer by layer."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from qexp.picture import Picture, figure
from qexp.pivot import Setting, differing
from qexp.runs import Column

# Okabe and Ito: told apart with any colour vision, and by their markers in grey
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LONGEST = 24  # letters of a name that has room beside its line
MOST = 6  # names beside their lines
GREY = "#666666"
PANEL = ("model", "data", "calibration")  # what a panel has in common

Say = Callable[[Setting, Column], str]


def against_bits(
    settings: Sequence[Setting],
    columns: Iterable[Column],
    x: str = "weight/bits",
    say: Say = lambda setting, column: setting.run.command,
) -> Picture:
    """A panel for each column, model and data. `x`: a metric or a number of the configuration."""
    panels: list[tuple[Column, str, list[Setting]]] = []
    for column in columns:
        found: dict[str, list[Setting]] = {}
        for setting in settings:
            if math.isfinite(setting.spread(column).mean):
                subject = ", ".join(setting.label(key) for key in PANEL)
                found.setdefault(subject, []).append(setting)
        panels += [(column, subject, members) for subject, members in found.items()]
    across = min(len(panels), 3) or 1
    down = math.ceil(len(panels) / across) or 1
    picture = Picture(figure(6.4 * across, 4.4 * down))
    for index, (column, subject, members) in enumerate(panels):
        axes = picture.figure.add_subplot(down, across, index + 1)
        _panel(picture, axes, column, members, x, say)
        axes.set_title(subject, loc="left", fontsize=11)
    return picture


def layers(errors: Mapping[str, float], limits: tuple[float, float] | None = None) -> Picture:
    """Blocks down, linears of a block across, the error's logarithm as colour.

    `limits`: errors at the ends of the scale, so that several pictures can share it.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle

    places = {name: place(name) for name in errors}
    blocks = sorted({block for block, _ in places.values()})
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    low, high = limits or span(errors.values())
    norm = LogNorm(low, max(high, low * 1.01), clip=True)
    scale: Any = ScalarMappable(norm, colormaps["viridis"])
    picture = Picture(figure(1.6 + 0.36 * len(kinds), 1.2 + 0.1 * len(blocks)))
    axes = picture.figure.add_subplot()
    for name, (block, kind) in places.items():
        value = errors[name]
        mark = Rectangle(
            (kinds.index(kind) - 0.5, blocks.index(block) - 0.5),
            1,
            1,
            facecolor=scale.to_rgba(value) if value > 0 else "white",
            edgecolor="white",
            linewidth=0.4,
            gid=picture.name(f"{name}: {value:.3g}"),
        )
        axes.add_patch(mark)
    axes.set_xlim(-0.5, len(kinds) - 0.5)
    axes.set_ylim(len(blocks) - 0.5, -0.5)
    short = [kind.rpartition(".")[2] for kind in kinds]
    names = short if len(set(short)) == len(short) else kinds
    axes.set_xticks(range(len(kinds)), names, rotation=40, ha="right", fontsize=8)
    step = math.ceil(len(blocks) / 10)
    axes.set_yticks(range(0, len(blocks), step), [str(each) for each in blocks[::step]], fontsize=8)
    axes.set_ylabel("block", fontsize=9)
    axes.spines[:].set_visible(False)
    bar = picture.figure.colorbar(scale, ax=axes, fraction=0.05)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    return picture


def place(name: str) -> tuple[int, str]:
    """The block of a linear, and its name there."""
    found = re.match(r"(?:.*?\.)?(\d+)\.(.+)", name)
    return (int(found[1]), found[2]) if found else (0, name)


def span(values: Iterable[float]) -> tuple[float, float]:
    """The least and the largest that a logarithm can show."""
    shown = [value for value in values if value > 0 and math.isfinite(value)]
    return (min(shown), max(shown)) if shown else (1e-6, 1.0)


def _panel(
    picture: Picture, axes: Any, column: Column, settings: Sequence[Setting], x: str, say: Say
) -> None:
    labels: list[tuple[float, float, str, str]] = []
    front: list[tuple[float, float]] = []
    for index, (name, members) in enumerate(_series(settings).items()):
        found = [(setting.value(x), setting.spread(column).mean, setting) for setting in members]
        points = sorted((p for p in found if math.isfinite(p[0])), key=lambda point: point[:2])
        if not points:
            continue
        front += [(at, value) for at, value, _ in points]
        colour = COLOURS[index % len(COLOURS)]
        # a colour that comes again has another marker
        marker = MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]
        look = {"color": colour, "marker": marker}
        axes.plot([p[0] for p in points], [p[1] for p in points], color=colour, lw=1.6)
        for at, value, setting in points:
            spread = setting.spread(column).deviation
            spread = setting.error(column) if math.isnan(spread) else spread
            error = spread if math.isfinite(spread) else 0.0
            axes.errorbar([at], [value], yerr=[error], color=colour, lw=1, capsize=2)
            mark = picture.name(say(setting, column))
            # points of lines that meet stay apart by their white edges
            axes.plot([at], [value], **look, ms=7, mec="white", ls="", gid=mark, zorder=3)
        axes.plot([], [], **look, label=name)
        labels.append((points[0][0], points[0][1], name, colour))
    best = pareto(front, column.higher)
    axes.plot(*zip(*best, strict=True), color="#dddddd", lw=7, zorder=0) if len(best) > 1 else None
    for value in sorted({s.spread(column).mean for s in settings if s.run.is_float}):
        axes.axhline(value, color=GREY, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
        note = axes.annotate(
            f"float {value:.{2 if value >= 1 else 4}f}",
            (0, value),  # at the left the lines are far away
            xycoords=("axes fraction", "data"),
            xytext=(4, 3),
            textcoords="offset points",
        )
        note.set(ha="left", va="bottom", color=GREY, fontsize=9)
    if column.is_perplexity:
        axes.set_yscale("log")
        _plain_ticks(axes)
    _label(axes, labels)
    axes.set_xlabel("bits per weight, measured" if x == "weight/bits" else x)
    axes.set_ylabel(column.title.replace("/ppl", ", perplexity"))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", which="major", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)


def pareto(points: Iterable[tuple[float, float]], higher: bool) -> list[tuple[float, float]]:
    """Those than which no other is both at most as large and better, by size."""
    kept: list[tuple[float, float]] = []
    for at, value in sorted(points, key=lambda p: (p[0], -p[1] if higher else p[1])):
        if not kept or (value > kept[-1][1] if higher else value < kept[-1][1]):
            kept.append((at, value))
    return kept


def _series(settings: Sequence[Setting]) -> dict[str, list[Setting]]:
    """Quantized settings that differ in bits alone form a line, named by what differs between."""
    quantized = [setting for setting in settings if not setting.run.is_float]
    keys = [key for key in differing(quantized) if key not in (*PANEL, "weight.bits")]
    series: dict[str, list[Setting]] = {}
    for setting in quantized:
        words = [
            label if key in setting.run.choices else f"{key.rpartition('.')[2]}={label}"
            for key in dict.fromkeys(["method", *keys])
            if (label := setting.label(key)) not in ("", "none")
        ]
        series.setdefault(", ".join(words), []).append(setting)
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
    if longest > LONGEST or len(labels) > MOST:  # would cover the lines, or each other
        below = (
            {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16)} if len(labels) > MOST else {}
        )
        axes.legend(frameon=False, fontsize=9, **below)
        return
    low, high = axes.get_xlim()
    axes.set_xlim(low - (high - low) * min(0.5, 0.03 + 0.016 * longest), high)
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
