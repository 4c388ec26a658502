"""Operations and memory of the stages of a GPTQ job by formula, and power laws fitted to costs."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from qexp.commands.bench.sizes import Sizes
from qexp.models import footprint
from qexp.task import positions
from qexp.walk import memory

STAGES = ("forward", "Hessian", "solve", "write", "pack", "evaluation")


def matrices(sizes: Sizes) -> list[tuple[int, int]]:
    """Rows and columns of what a block of a Llama has solved as one matrix: q, k and v; o; gate and
    up; down. These share a Hessian."""
    values = sizes.hidden * sizes.kv_heads // sizes.heads
    return [
        (sizes.hidden + 2 * values, sizes.hidden),
        (sizes.hidden, sizes.hidden),
        (2 * sizes.intermediate, sizes.hidden),
        (sizes.hidden, sizes.intermediate),
    ]


def operations(sizes: Sizes) -> dict[str, float]:
    """Additions and multiplications of each stage, of all blocks.

    With T tokens in sequences of length L, and matrices of r rows and c columns:

    forward: 2 T r c for each matrix, and 4 T L hidden for both products of attention.
    Hessian: T c² (2 T c² for x xᵀ, of which half is computed).
    solve: c³/3 for the Cholesky factor and c³ for its inverse against c right sides, and r c² for
    the updates of later columns (GPTQ, 2210.17323, section 3).
    write: r c² for tr(Δ H Δᵀ) with a symmetric H, of the weight, of GPTQ's error and of that of
    rounding to nearest.
    pack: two for each weight, which is unpacked and packed.
    evaluation: forward of as many tokens, and 2 T vocabulary hidden for the head.
    """
    own, tokens = matrices(sizes), sizes.tokens
    weights = sum(rows * columns for rows, columns in own)
    forward = 2 * tokens * weights + 4 * tokens * sizes.length * sizes.hidden
    block = {
        "forward": forward,
        "Hessian": sum(tokens * columns**2 for _, columns in own),
        "solve": sum(4 / 3 * columns**3 + rows * columns**2 for rows, columns in own),
        "write": sum(3 * rows * columns**2 for rows, columns in own),
        "pack": 2 * weights,
        "evaluation": forward,
    }
    found = {stage: float(sizes.blocks * count) for stage, count in block.items()}
    found["evaluation"] += 2.0 * tokens * sizes.vocabulary * sizes.hidden
    return found


def numbers(sizes: Sizes, at_once: int) -> dict[str, float]:
    """Numbers that each stage holds beyond the weights, by the formulas of `--dry-run`.

    at_once: tokens of a forward pass of evaluation.
    """
    own = matrices(sizes)
    widest = max(sizes.intermediate, sizes.hidden)
    chunk = memory.sequences(sizes.length, widest, sizes.hidden, 4) * sizes.length
    inside = memory.suspended(sizes.tokens, widest, sizes.hidden)
    inside += memory.inside(min(chunk, sizes.tokens), widest, sizes.hidden)
    return {
        "forward": inside,
        "Hessian": inside + widest**2,
        "solve": inside + footprint.solving(own),
        "write": inside + footprint.solving(own),
        "pack": max(rows * columns for rows, columns in own),
        "evaluation": memory.inside(min(at_once, sizes.tokens), widest, sizes.hidden)
        + 2 * positions(sizes.vocabulary, 4) * sizes.vocabulary,
    }


class Law(NamedTuple):
    """value = exp(offset) · count^exponent, by least squares of logarithms.

    deviation: standard deviation of the logarithms from the law, with two degrees of freedom less
    than points. center, square: mean of the logarithms of the counts, and sum of the squares of
    their distances from it. points: their number. rate: the highest count / value of them.
    """

    exponent: float
    offset: float
    deviation: float
    center: float
    square: float
    points: int
    rate: float

    def at(self, count: float) -> float:
        return math.exp(self.offset + self.exponent * math.log(count))

    def error(self, count: float) -> float:
        """The factor between which and its inverse a value at `count` is expected: e to twice the
        standard error of a prediction of the regression."""
        away = (math.log(count) - self.center) ** 2 / self.square
        return math.exp(2 * self.deviation * math.sqrt(1 + 1 / self.points + away))


def fit(counts: Sequence[float], values: Sequence[float]) -> Law:
    """The law of positive values. Raises ValueError where there are no two different counts."""
    x, y = [math.log(c) for c in counts], [math.log(v) for v in values]
    center, level = sum(x) / len(x), sum(y) / len(y)
    square = sum((each - center) ** 2 for each in x)
    if square == 0:
        raise ValueError("a law needs two different counts")
    exponent = sum((a - center) * (b - level) for a, b in zip(x, y, strict=True)) / square
    offset = level - exponent * center
    left = sum((b - offset - exponent * a) ** 2 for a, b in zip(x, y, strict=True))
    deviation = math.sqrt(left / (len(x) - 2)) if len(x) > 2 else 0.0
    rate = max(count / value for count, value in zip(counts, values, strict=True))
    return Law(exponent, offset, deviation, center, square, len(x), rate)


class Prediction(NamedTuple):
    """Seconds of a stage or of all, with the least and the most by the error of the fit."""

    seconds: float
    least: float
    most: float


def predicted(
    laws: Mapping[str, Law], sizes: Sizes, faster: Mapping[str, float]
) -> dict[str, Prediction]:
    """Seconds of each stage at other sizes, and of `all` stages.

    An exponent below 1, small matrices being slow, is not continued: no stage is predicted to
    compute faster than where it was fastest. faster: how many times as many operations per second
    other hardware computes, by stage.
    """
    found, counts = {}, operations(sizes)
    for stage, law in laws.items():
        count, error = counts[stage], law.error(counts[stage])
        bound = count / law.rate
        seconds = max(law.at(count), bound)
        each = (seconds, max(seconds / error, bound), seconds * error)
        found[stage] = Prediction(*(value / faster[stage] for value in each))
    return found | {"all": Prediction(*map(sum, zip(*found.values(), strict=True)))}
