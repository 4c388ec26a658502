"""Best setting per column, and differences from a baseline with paired t-tests over seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from qexp.common.errors import UserError
from qexp.report.pivot import Setting, Spread, Table, differing
from qexp.runs.finished import Column

NEAR = 0.05  # bits per weight within which settings compete
CONFIDENCE = 0.95  # of an interval; it excludes zero where p is below 1 - CONFIDENCE


@dataclass(frozen=True)
class Difference:
    """A setting less its baseline over the seeds they share, and a paired t-test by seed.

    `low`, `high`: the interval of the mean difference; of perplexities that of their ratio less 1.
    `p`, `low` and `high` are NaN where nothing can be tested: one seed, no finite values, or seeds
    that change nothing. `below`: seeds whose difference is negative.
    """

    mean: float
    deviation: float
    count: int
    p: float
    low: float
    high: float
    below: int

    def interval(self, column: Column) -> str:
        """From `low` to `high`, in percent where the column's differences are ratios."""
        form = ".1%" if column.is_perplexity else ".3g"
        return f"{self.low:+{form}} to {self.high:+{form}}"


def best(table: Table) -> set[tuple[int, Column]]:
    """The best of each column, as `(id(setting), column)`.

    Only quantized settings of one model and placement whose measured bits differ by no more than
    NEAR compete; a setting that has no rival is not the best.
    """
    winners: set[tuple[int, Column]] = set()
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
                    winners.add((id(setting), column))
    return winners


def _near(one: float, other: float) -> bool:
    """Whether two numbers of bits differ by at most NEAR; settings without bits are all near."""
    if math.isnan(one) or math.isnan(other):
        return math.isnan(one) and math.isnan(other)
    return abs(one - other) <= NEAR + 1e-9


def compare(setting: Setting, baseline: Setting, column: Column) -> Difference | None:
    """None where they share no seed. Perplexities are tested by their logarithms."""
    return effect([(setting, baseline)], column)


def effect(pairs: Sequence[tuple[Setting, Setting]], column: Column) -> Difference | None:
    """What several pairs of a setting and its baseline have in common, over the seeds that all of
    them share.

    Pairs that share a seed are not independent: differences are averaged within a seed first.
    """
    values = [(a.spread(column).values, b.spread(column).values) for a, b in pairs]
    shared = [seed for seed in values[0][0] if all(seed in v for pair in values for v in pair)]
    if not shared:
        return None
    moved = Spread({s: fmean(one[s] - other[s] for one, other in values) for s in shared})
    logarithms = column.is_perplexity and all(v[s] > 0 for p in values for v in p for s in shared)
    tested = list(moved.values.values())
    if logarithms:
        tested = [fmean(math.log(one[s] / other[s]) for one, other in values) for s in shared]
    p, low, high = _test(tested)
    if logarithms:
        low, high = (math.inf if end > 700 else math.expm1(end) for end in (low, high))
    below = sum(value < 0 for value in tested)
    return Difference(moved.mean, moved.deviation, moved.count, p, low, high, below)


def counterparts(settings: Sequence[Setting], chosen: Mapping[str, str]) -> dict[int, Setting]:
    """For each setting (by its id) the baseline that agrees with it in all other keys.

    `chosen`: the labels of a baseline. A key that one of the two does not have (a solver's
    damping, compared with round-to-nearest) is ignored; a float baseline must only have the same
    model, data and calibration. A setting with several such baselines has none.

    Raises UserError if no setting is a baseline.
    """
    baselines = [each for each in settings if all(each.label(k) == v for k, v in chosen.items())]
    if not baselines:
        wanted = ",".join(f"{key}={value}" for key, value in chosen.items())
        seen = sorted({each.label(key) for each in settings for key in chosen})
        raise UserError(f"--baseline {wanted}: no run has it; there are {', '.join(seen)}")
    keys = [key for key in differing(settings) if key not in chosen]
    counterparts = {}
    for setting in settings:
        like = [each for each in baselines if each is not setting and _alike(setting, each, keys)]
        if len(like) == 1 and setting not in baselines:
            counterparts[id(setting)] = like[0]
    return counterparts


def _alike(setting: Setting, baseline: Setting, keys: Sequence[str]) -> bool:
    for key in keys:
        one, other = setting.label(key), baseline.label(key)
        if baseline.run.is_float and key not in ("model", "data", "calibration"):
            continue
        if one and other and one != other:
            return False
    return True


def _test(moved: Sequence[float]) -> tuple[float, float, float]:
    """p, two-sided, and the interval of the mean; NaN where they cannot be said."""
    if len(set(moved)) < 2 or not all(map(math.isfinite, moved)):
        return math.nan, math.nan, math.nan
    from scipy.stats import ttest_1samp  # seconds to import

    found = ttest_1samp(moved, 0.0)
    low, high = found.confidence_interval(CONFIDENCE)
    return float(found.pvalue), float(low), float(high)
