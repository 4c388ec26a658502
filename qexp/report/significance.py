"""Which setting is best, and how far one is from another over the seeds they share."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qexp.common.errors import UserError
from qexp.report.pivot import Setting, Spread, Table, differing
from qexp.runs.finished import Column

NEAR = 0.05  # bits per weight within which settings compete


@dataclass(frozen=True)
class Difference:
    """A setting less its baseline over the seeds they share, and the p of a paired t-test."""

    mean: float
    deviation: float
    count: int
    p: float


def best(table: Table) -> set[tuple[int, Column]]:
    """The best of each column, as `(id(setting), column)`.

    Only quantized settings of one model and placement whose measured bits differ by no more than
    NEAR compete; a setting that has no rival is not the best.
    """
    found: set[tuple[int, Column]] = set()
    for column in table.columns:
        alike: dict[tuple[str, ...], list[tuple[float, Setting]]] = {}
        for row in table.rows:
            for place, setting in row.cells.items():
                value = setting.spread(column).mean
                if setting.run.is_float or math.isnan(value):
                    continue
                same = [setting.label(key) for key in ("model", "data", "activation", "kv")]
                rank = -value if column.higher else value
                alike.setdefault((*place, *same), []).append((rank, setting))
        for members in alike.values():
            for rank, setting in members:
                ranks = [other for other, each in members if _near(setting.bits, each.bits)]
                if len(ranks) > 1 and rank == min(ranks):
                    found.add((id(setting), column))
    return found


def _near(one: float, other: float) -> bool:
    """Whether so many bits are about the same; where none are counted, all are."""
    if math.isnan(one) or math.isnan(other):
        return math.isnan(one) and math.isnan(other)
    return abs(one - other) <= NEAR + 1e-9


def compare(setting: Setting, baseline: Setting, column: Column) -> Difference | None:
    """None where they share no seed. Perplexities are tested by their logarithms."""
    one, other = setting.spread(column).values, baseline.spread(column).values
    shared = [seed for seed in one if seed in other]
    if not shared:
        return None
    moved = Spread({seed: one[seed] - other[seed] for seed in shared})
    pairs = [(one[seed], other[seed]) for seed in shared]
    return Difference(moved.mean, moved.deviation, moved.count, _p(pairs, column.is_perplexity))


def counterparts(settings: Sequence[Setting], chosen: Mapping[str, str]) -> dict[int, Setting]:
    """For each setting (by its id) the baseline that is like it in all else, where one alone is.

    A key that either of the two does not have (a solver's damping, against round-to-nearest) does
    not count, and of a float baseline only model and data do.
    """
    known = [each for each in settings if all(each.label(k) == v for k, v in chosen.items())]
    if not known:
        wanted = ",".join(f"{key}={value}" for key, value in chosen.items())
        seen = sorted({each.label(key) for each in settings for key in chosen})
        raise UserError(f"--baseline {wanted}: no run is so; there are {', '.join(seen)}")
    keys = [key for key in differing(settings) if key not in chosen]
    found = {}
    for setting in settings:
        like = [each for each in known if each is not setting and _alike(setting, each, keys)]
        if len(like) == 1 and setting not in known:
            found[id(setting)] = like[0]
    return found


def _alike(setting: Setting, baseline: Setting, keys: Sequence[str]) -> bool:
    for key in keys:
        one, other = setting.label(key), baseline.label(key)
        if baseline.run.is_float and key not in ("model", "data", "calibration"):
            continue
        if one and other and one != other:
            return False
    return True


def _p(pairs: Sequence[tuple[float, float]], logarithms: bool) -> float:
    """Two-sided; NaN where it cannot be said: one seed, no finite values, no variation."""
    if logarithms and all(min(pair) > 0 for pair in pairs):
        pairs = [(math.log(one), math.log(other)) for one, other in pairs]
    moved = [one - other for one, other in pairs]
    if len(set(moved)) < 2 or not all(map(math.isfinite, moved)):
        return math.nan
    from scipy.stats import ttest_1samp  # seconds to import

    return float(ttest_1samp(moved, 0.0).pvalue)
