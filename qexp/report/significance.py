"""Best setting per column, settings level with it, and paired differences from a baseline."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from qexp.common.errors import UserError
from qexp.report.pivot import Setting, Spread, Table, differing
from qexp.runs.finished import Column

NEAR = 0.05  # bits per weight within which settings compete
SAME = ("model", "data", "calibration")  # what any setting and its baseline share
CONFIDENCE = 0.95  # of an interval; it excludes zero where p is below 1 - CONFIDENCE


@dataclass(frozen=True)
class Difference:
    """A setting less its baseline over the seeds they share, and a paired t-test by seed.

    `mean`, `deviation`: in the metric's unit. `change`: the estimate that the test is about, the
    mean difference or, where it is `relative` (perplexities), the mean ratio less 1 by logarithms.
    `low`, `high`: the 95 % interval of `change`. `p`, `low` and `high` are NaN where nothing can be
    tested: one seed, no finite values, or seeds that change nothing. `below`: seeds whose
    difference is negative.
    """

    mean: float
    deviation: float
    count: int
    change: float
    relative: bool
    p: float
    low: float
    high: float
    below: int

    @property
    def tested(self) -> bool:
        """Whether there is an interval."""
        return not math.isnan(self.low)

    @property
    def level(self) -> bool:
        """Whether there is an interval and it includes zero."""
        return self.low <= 0 <= self.high

    def interval(self) -> str:
        """From `low` to `high`, in percent where it is relative."""
        form = ".1%" if self.relative else ".3g"
        return f"{self.low:+{form}} to {self.high:+{form}}"


@dataclass(frozen=True)
class Standing:
    """The best of each column and the settings level with it, as `(id(setting), column)`."""

    best: frozenset[tuple[int, Column]]
    level: frozenset[tuple[int, Column]]


def standing(table: Table) -> Standing:
    """Only quantized settings of one model and placement whose measured bits differ by no more than
    NEAR compete; a setting that has no rival is not the best. Bits are those of weights or, where
    none is quantized, of the cache, whatever its choice.

    A rival of the best is level with it where the interval of their paired difference includes
    zero; one seed tests nothing, and then nothing is level.
    """
    best: set[tuple[int, Column]] = set()
    level: set[tuple[int, Column]] = set()
    for column in (each for each in table.columns if not each.is_size):
        alike: dict[tuple[str, ...], list[tuple[float, float, Setting]]] = {}
        for row in table.rows:
            for place, setting in row.cells.items():
                value = setting.spread(column).mean
                if setting.run.is_float or math.isnan(value):
                    continue
                placement, size = _competing(setting)
                same = [setting.label(key) for key in ("model", "data", *placement)]
                member = (-value if column.higher else value, size, setting)
                alike.setdefault((*place, *same), []).append(member)
        for members in alike.values():
            for rank, bits, winner in members:
                rivals = [(other, each) for other, size, each in members if _near(bits, size)]
                if len(rivals) < 2 or rank > min(other for other, _ in rivals):
                    continue
                best.add((id(winner), column))
                for other, rival in rivals:
                    moved = compare(rival, winner, column) if other > rank else None
                    if moved is not None and moved.level:
                        level.add((id(rival), column))
    return Standing(frozenset(best), frozenset(level - best))


def _competing(setting: Setting) -> tuple[tuple[str, ...], float]:
    """The placement that rivals share, and the bits that are compared."""
    caches = [column.name for column in setting.run.columns if column.is_size]
    if math.isnan(setting.bits) and caches:
        return ("activation",), setting.value(caches[0])
    return ("activation", "kv"), setting.bits


def _near(one: float, other: float) -> bool:
    """Whether two numbers of bits differ by at most NEAR; settings without bits are all near."""
    if math.isnan(one) or math.isnan(other):
        return math.isnan(one) and math.isnan(other)
    return abs(one - other) <= NEAR + 1e-9


def compare(setting: Setting, baseline: Setting, column: Column) -> Difference | None:
    """None where they share no seed. Perplexities are tested by their logarithms."""
    return effect([(setting, baseline)], column)


def effect(pairs: Sequence[tuple[Setting, Setting]], column: Column) -> Difference | None:
    """What several pairs of a setting and its baseline have in common, over the samples (a seed and
    whatever else a setting is averaged over) that all of them share.

    Pairs that share a seed are not independent: differences are averaged within a seed first.
    """
    values = [(a.spread(column).values, b.spread(column).values) for a, b in pairs]
    shared = [key for key in values[0][0] if all(key in v for pair in values for v in pair)]
    if not shared:
        return None
    by_seed: dict[str, list[tuple[float, float]]] = {}
    for key in shared:
        both = [(one[key], other[key]) for one, other in values]
        by_seed.setdefault(pairs[0][0].seed(key), []).extend(both)
    moved = Spread({s: fmean(a - b for a, b in found) for s, found in by_seed.items()})
    tested, change = list(moved.values.values()), moved.mean
    relative = column.is_perplexity and all(min(p) > 0 for f in by_seed.values() for p in f)
    if relative:
        tested = [fmean(math.log(a / b) for a, b in found) for found in by_seed.values()]
        change = _ratio(fmean(tested))
    p, low, high = _test(tested)
    if relative:
        low, high = _ratio(low), _ratio(high)
    below = sum(value < 0 for value in tested)
    return Difference(
        moved.mean, moved.deviation, moved.count, change, relative, p, low, high, below
    )


def counterparts(settings: Sequence[Setting], chosen: Mapping[str, str]) -> dict[int, Setting]:
    """For each setting (by its id) the baseline that agrees with it in all other keys.

    `chosen`: the labels of a baseline. A key that one of the two does not have (a solver's
    damping, compared with round-to-nearest) is ignored; a float baseline must only have the same
    model, data and calibration. A setting with several such baselines has none.

    A baseline chosen by its `label` is a row of a table of different methods: it too must only have
    the same model, data and calibration, and of several the one of the nearest stored bits counts.

    Raises UserError if no setting is a baseline.
    """
    baselines = [each for each in settings if all(each.label(k) == v for k, v in chosen.items())]
    if not baselines:
        wanted = ",".join(f"{key}={value}" for key, value in chosen.items())
        seen = sorted({each.label(key) or '""' for each in settings for key in chosen})
        raise UserError(f"baseline {wanted}: no run has it; there are {', '.join(seen)}")
    keys = [key for key in differing(settings) if key not in chosen]
    if by_label := "label" in chosen:
        keys = [key for key in keys if key in SAME]
    counterparts = {}
    for setting in settings:
        like = [each for each in baselines if each is not setting and _alike(setting, each, keys)]
        if by_label:
            like = sorted(like, key=lambda each: abs(each.bits - setting.bits))[:1]
        if len(like) == 1 and setting not in baselines:
            counterparts[id(setting)] = like[0]
    return counterparts


def _alike(setting: Setting, baseline: Setting, keys: Sequence[str]) -> bool:
    for key in keys:
        one, other = setting.label(key), baseline.label(key)
        if baseline.run.is_float and key not in SAME:
            continue
        if one and other and one != other:
            return False
    return True


def _ratio(logarithm: float) -> float:
    """A ratio less 1; infinite beyond what a float holds."""
    return math.inf if logarithm > 700 else math.expm1(logarithm)


def _test(moved: Sequence[float]) -> tuple[float, float, float]:
    """p, two-sided, and the interval of the mean; NaN where they cannot be said."""
    if len(set(moved)) < 2 or not all(map(math.isfinite, moved)):
        return math.nan, math.nan, math.nan
    from scipy.stats import ttest_1samp  # seconds to import

    found = ttest_1samp(moved, 0.0)
    low, high = found.confidence_interval(CONFIDENCE)
    return float(found.pvalue), float(low), float(high)
