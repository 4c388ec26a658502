"""Activation outliers of a model: quantization error and statistics per tensor."""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from qexp.commands import outlier_ranks
from qexp.common.errors import UserError
from qexp.common.files import atomic
from qexp.common.progress import bar
from qexp.config.instantiate import instantiate
from qexp.config.location import conf
from qexp.eval.anatomy import Statistics, Tally, anatomy
from qexp.grid.outlier_error import Errors, Moments, decompose
from qexp.models.base import ModelSource
from qexp.models.device import as_task
from qexp.quantizers.scheme import Activations, QuantizedActivations
from qexp.report.figure import Picture, figure
from qexp.report.plots import COLOURS, GREY
from qexp.runs import resolvers
from qexp.task import Batch, Task, singly

DEVIATIONS = 3.0  # standard deviations beyond which a value is an outlier
MOST = 0.9  # share of the noise from ranges that the problem tensors have together
COLUMNS = (
    *("tensor", "min", "max", "deviation", "stretch", "outliers"),
    *("inlier", "range", "outlier", "noise"),
)


@dataclass(frozen=True)
class Row:
    """Statistics of one tensor over all calibration data."""

    name: str
    moments: Moments
    errors: Errors
    tally: Tally

    @property
    def stretch(self) -> float:
        """The ratio of the full range to that of the inliers."""
        low, high = self.moments.inliers(DEVIATIONS)
        return (self.moments.high - self.moments.low) / (high - low) if high > low else 1.0

    def cells(self) -> dict[str, str | float]:
        """Values by COLUMNS; errors are relative to their sum."""
        errors, total = self.errors, self.errors.total or 1.0
        return {
            "tensor": self.name,
            "min": self.moments.low,
            "max": self.moments.high,
            "deviation": self.moments.deviation,
            "stretch": self.stretch,
            "outliers": errors.outliers / self.moments.count,
            "inlier": errors.inlier / total,
            "range": errors.range / total,
            "outlier": errors.outlier / total,
            "noise": errors.noise,
        }


@torch.no_grad()
def survey(task: Task, batches: Sequence[Batch], kind: QuantizedActivations) -> list[Row]:
    """Statistics of every tensor of the placement, in order of execution.

    Takes two passes over the data, one sequence at a time: for the ranges and for the errors.
    """
    sites = kind.placement.sites(task)
    moments = {site.name: Moments() for site in sites}
    errors = {site.name: Errors() for site in sites}
    tallies = {site.name: Tally() for site in sites}

    def measure(name: str, x: torch.Tensor) -> None:
        found = decompose(x, moments[name], kind.grid, DEVIATIONS)
        errors[name] = errors[name].plus(found)
        tallies[name].add(x)

    def show(see: Callable[[str, torch.Tensor], None]) -> None:
        handles = [site.watch(partial(see, site.name)) for site in sites]
        try:
            for row in bar(singly(batches), "activation ranges"):
                task.loss(row)
        finally:
            for handle in handles:
                handle.remove()

    show(lambda name, x: moments[name].add(x))
    show(measure)
    names = [site.name for site in sites]
    return [Row(name, moments[name], errors[name], tallies[name]) for name in names]


def problems(rows: Sequence[Row]) -> list[Row]:
    """The smallest set of tensors with the share MOST of the noise, worst first."""
    ranked = sorted(rows, key=lambda row: row.errors.noise, reverse=True)
    whole = sum(max(row.errors.noise, 0.0) for row in rows)
    found, reached = [], 0.0
    for row in ranked:
        if reached >= MOST * whole:
            break
        found.append(row)
        reached += row.errors.noise
    return found


def markdown(rows: Sequence[Row]) -> str:
    """A summary and the table, worst tensor first, problem tensors in bold."""
    worst = problems(rows)
    shares = [row.errors.share for row in rows]
    whole = sum(row.errors.total for row in rows) or 1.0
    names = ", ".join(f"`{row.name}`" for row in worst) or "none"
    lines = [
        f"Of the quantization error, the range of outliers causes {sum(shares) / len(shares):.0%} "
        f"on average over {len(rows)} tensors, {sum(row.errors.range for row in rows) / whole:.0%} "
        "of all squares together.",
        f"{MOST:.0%} of what ranges cost, relative to the power of the inliers, is in: {names}.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'|'.join(['---', *['--:'] * (len(COLUMNS) - 1)])}|",
    ]
    for row in sorted(rows, key=lambda row: row.errors.noise, reverse=True):
        mark = "**" if row in worst else ""
        cells = row.cells()
        numbers = [
            *(f"{cells[key]:.4g}" for key in ("min", "max", "deviation", "stretch")),
            *(f"{cells[key]:.2%}" for key in ("outliers", "inlier", "range", "outlier")),
            f"{cells['noise']:.3g}",
        ]
        lines.append(f"| {mark}{row.name}{mark} | {' | '.join(numbers)} |")
    return "\n".join(lines) + "\n"


def summary(statistics: Statistics) -> str:
    """A table of every statistic: its median, its largest value and the name of that tensor."""
    lines = ["", "| statistic | tensors | median | largest | of |", "|---|--:|--:|--:|---|"]
    for key in dict.fromkeys(key for each in statistics.values() for key in each):
        found = {name: each[key] for name, each in statistics.items() if key in each}
        worst = max(found, key=found.__getitem__)
        numbers = f"{median(found.values()):.4g} | {found[worst]:.4g}"
        lines.append(f"| {key} | {len(found)} | {numbers} | {worst} |")
    return "\n".join(lines) + "\n"


def draw(surveys: dict[str, list[Row]]) -> Picture:
    """Ranges of all tensors of each model; below them the parts of the first model's errors."""
    made = figure(max(7.0, 0.09 * max(map(len, surveys.values())) + 3), 6.4)
    ranges, shares = made.subplots(2, 1, sharex=True)
    for index, (label, rows) in enumerate(surveys.items()):
        at = [number + 0.35 * index for number in range(len(rows))]
        low, high = ([getattr(row.moments, end) for row in rows] for end in ("low", "high"))
        ranges.vlines(at, low, high, color=COLOURS[index], linewidth=2, label=label)
        inner = [row.moments.inliers(DEVIATIONS) for row in rows]
        ranges.vlines(at, *zip(*inner, strict=True), color=GREY, linewidth=2)
    ranges.set_yscale("symlog", linthresh=1.0)
    ranges.set_ylabel(f"range; grey: within {DEVIATIONS:g} deviations")
    ranges.legend(frameon=False, fontsize=9)
    rows = next(iter(surveys.values()))
    bottom = [0.0] * len(rows)
    parts = (("range", COLOURS[1]), ("inlier", COLOURS[4]), ("outlier", COLOURS[6]))
    for key, colour in parts:
        heights = [max(float(row.cells()[key]), 0.0) for row in rows]
        shares.bar(range(len(rows)), heights, 1.0, bottom, color=colour, label=key)
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    shares.set_ylabel("share of the error")
    shares.set_xlabel("tensor, in order of execution")
    shares.legend(frameon=False, fontsize=9, ncols=3)
    # Above the frame, each name on its own line, because the worst are often neighbours.
    for line, row in enumerate(problems(rows)[:4]):
        place = rows.index(row)
        ranges.annotate(
            row.name,
            (place, row.moments.high),
            (place, 1.02 + 0.05 * line),
            textcoords=("data", "axes fraction"),
            fontsize=7,
            ha="center",
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.5},
        )
    for axes in (ranges, shares):
        axes.spines[["top", "right"]].set_visible(False)
    return Picture(made)


def write(folder: Path, surveys: dict[str, list[Row]], statistics: Mapping[str, Statistics]) -> str:
    """Writes `<label>.csv`, `<label>_statistics.csv` and `<label>.md` of each model and
    `ranges.png`; returns the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = {label: markdown(rows) + summary(statistics[label]) for label, rows in surveys.items()}
    for label, rows in surveys.items():
        with atomic(folder / f"{label}.csv") as path, path.open("w", newline="") as file:
            table = csv.DictWriter(file, COLUMNS)
            table.writeheader()
            table.writerows(row.cells() for row in rows)
        with atomic(folder / f"{label}_statistics.csv") as path, path.open("w") as file:
            file.write("tensor,statistic,value\n")
            for name, found in statistics[label].items():
                file.writelines(f"{name},{key},{value!r}\n" for key, value in found.items())
        with atomic(folder / f"{label}.md") as path:
            path.write_text(pages[label], encoding="utf-8")
    draw(surveys).png(folder / "ranges.png")
    return "\n".join(f"{label}\n\n{page}" for label, page in pages.items())


def measured(overrides: Sequence[str]) -> tuple[list[Row], Statistics]:
    """Errors and statistics of the configured model's tensors on its calibration data.

    Raises UserError unless activations are quantized per tensor with static ranges.
    """
    chosen = any(key.startswith("activation=") for key in overrides)
    cfg: DictConfig = compose(
        "config", [*overrides, *([] if chosen else ["activation=int8_tensor"])]
    )
    kind: Activations = instantiate(cfg.activation)
    if not isinstance(kind, QuantizedActivations) or kind.dynamic or not kind.grid.per_tensor:
        raise UserError("activation: outliers stretch static ranges; choose activation=int8_tensor")
    source: ModelSource = instantiate(cfg.model)
    task = as_task(source, source.loaded(), cfg)  # without quantizers that an earlier run left
    rows = survey(task, instantiate(cfg.calibration)(task), kind)
    return rows, anatomy({row.name: row.tally for row in rows}, task)


def main(arguments: Sequence[str]) -> None:
    """`qexp outliers FOLDER [key=value …] [-- key=value …]`: a model, then what it became;
    `qexp outliers ranks TABLE.csv`: rank correlations over models."""
    if arguments and arguments[0] == "ranks":
        outlier_ranks.main(arguments[1:])
        return
    if not arguments or "=" in arguments[0] or arguments[0].startswith("-"):
        raise UserError("outliers: the first argument is the folder to write to")
    folder, rest = Path(arguments[0]), list(arguments[1:])
    resolvers.register()
    both = [rest]
    if "--" in rest:
        cut = rest.index("--")
        both = [rest[:cut], rest[cut + 1 :]]
    labels = ("before", "after") if len(both) > 1 else ("ranges",)
    with initialize_config_dir(version_base="1.3", config_dir=str(conf())):
        found = {label: measured(overrides) for label, overrides in zip(labels, both, strict=True)}
    surveys = {label: rows for label, (rows, _) in found.items()}
    print(write(folder, surveys, {label: each for label, (_, each) in found.items()}))
