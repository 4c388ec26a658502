"""Rank correlations over models of activation statistics with losses of quality (2305.19268)."""

import csv
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from qexp.common.errors import UserError

LEAST = 3  # models; two have a correlation of 1 or -1 whatever they are


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """The correlation of the ranks, where equal values share their mean rank; NaN where all values
    of one are equal."""
    from scipy.stats import ConstantInputWarning, spearmanr  # seconds to import

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        return float(spearmanr(x, y).statistic)


def read(path: Path) -> tuple[list[Path], dict[str, list[float]]]:
    """A table with a row for each model: `statistics`, a file that `qexp outliers` wrote, relative
    to the table, and columns of numbers, such as the increase of the loss at W8A8.

    Raises UserError for a table without these columns, or of fewer models than LEAST.
    """
    if not path.is_file():
        raise UserError(f"outliers ranks: there is no file {path}; give a table of models")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in (rows[0] if rows else {}) if name != "statistics"]
    if not names or "statistics" not in rows[0]:
        raise UserError(
            f"{path}: give a column `statistics` and columns of numbers, for example "
            "statistics,w8a8"
        )
    if len(rows) < LEAST:
        raise UserError(f"{path}: {len(rows)} models have no rank correlation; give {LEAST}")
    try:
        numbers = {name: [float(row[name]) for row in rows] for name in names}
    except (TypeError, ValueError) as wrong:
        raise UserError(f"{path}: {wrong}; give one number in every cell") from wrong
    return [path.parent / row["statistics"] for row in rows], numbers


def medians(path: Path) -> dict[str, float]:
    """Of each statistic in a file that `qexp outliers` wrote, over the tensors that have it."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; `qexp outliers FOLDER` writes it")
    found: dict[str, list[float]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["statistic"], []).append(float(row["value"]))
    return {name: median(values) for name, values in found.items()}


def markdown(models: Sequence[Mapping[str, float]], numbers: Mapping[str, list[float]]) -> str:
    """A row for each statistic that all models have, a column for each quantity."""
    shared = [name for name in models[0] if all(name in each for each in models)]
    lines = [
        f"Spearman's rank correlation over {len(models)} models, of the median over tensors.",
        "",
        f"| statistic | {' | '.join(numbers)} |",
        f"|---|{'--:|' * len(numbers)}",
    ]
    for name in shared:
        own = [each[name] for each in models]
        cells = [f"{spearman(own, rises):+.2f}" for rises in numbers.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """`qexp outliers ranks TABLE.csv`."""
    if len(arguments) != 1:
        raise UserError("outliers ranks: give one table of models, ranks.csv")
    files, numbers = read(Path(arguments[0]))
    print(markdown([medians(file) for file in files], numbers))
