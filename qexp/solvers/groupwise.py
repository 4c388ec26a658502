"""SliM-LLM (Huang et al., 2405.14917): a bit width for each group of columns."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qexp.common.errors import UserError, check_bool, check_choice, check_int, check_number
from qexp.grid import IntGrid
from qexp.grid.range_search import TwoValues
from qexp.packed.parts import Parts
from qexp.solvers.apart import in_turn, left_factor
from qexp.solvers.base import Solution, Solver
from qexp.solvers.factor import inverse_factor
from qexp.solvers.gptq import GPTQ
from qexp.solvers.rtn import OnGrid

METRICS = ("hessian", "softmax_kl")


@dataclass(frozen=True)
class MixedGroups(OnGrid):
    """The i most salient groups of columns get `step` bits more, the i least salient as many less,
    and GPTQ solves the groups in turn. So the mean stays `grid.bits` where all groups are of one
    size.

    A group's salience is the sum of w² / U_jj². All i from `least` to half of the groups, which is
    left out, are tried with round-to-nearest.

    grid: its group size is that of the groups. At one bit a row of a group has two values, see
    `TwoValues`, and both cost `scale_dtype`.
    metric: what i is to minimize. "hessian": the sum over groups of the error that later groups do
    not make up for (`left_factor`); "softmax_kl" (the paper): the divergence of the softmax over a
    layer's outputs from that of the float outputs, for `tokens` inputs drawn with `seed` from a
    normal distribution with the moments of the Hessian, since a solver sees no others.
    damp: share of the mean diagonal added to the diagonal. (The reference first adds 0.01, so that
    its salience depends on the scale of the inputs.)
    centred: of `TwoValues`; false is the reference.
    """

    grid: IntGrid
    step: int = 1
    metric: str = "hessian"
    least: int = 0
    damp: float = 0.01
    centred: bool = True
    tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        check_int("method.solver", self, step=1, least=0, tokens=1)
        check_choice("method.solver", self, metric=METRICS)
        check_number("method.solver", self, damp=0)
        check_bool("method.solver", self, "centred")
        if self.step >= self.grid.bits:
            raise UserError(
                f"method.solver.step={self.step}: groups that get less would have no bits left; "
                f"give a step below weight.bits={self.grid.bits}."
            )

    def check(self, rows: int, columns: int) -> None:
        groups = self.grid.groups(columns)
        super().check(rows, columns)
        if self.least >= max(groups // 2, 1):
            raise UserError(
                f"method.solver.least={self.least}: weight.group_size={self.grid.group_size} cuts "
                f"{columns} inputs into {groups} groups; give a number below half of them, or "
                "smaller groups."
            )

    @property
    def rowwise(self) -> bool:
        return False  # a group has the same width in all rows

    def __call__(
        self,
        weight: Float[Tensor, "rows columns"],
        hessian: Float[Tensor, "columns columns"],
    ) -> Solution:
        factor = inverse_factor(hessian, self.damp)
        weight = weight.float().masked_fill(factor.dead, 0)
        salience = self.salience(weight, factor.upper)
        bits = self.widths(salience, self.pairs(weight, hessian, factor.upper, salience))
        sizes = [part.shape[1] for part in self._groups(weight)]
        solvers: list[Solver] = [GPTQ(self._grid(each), damp=0.0) for each in bits.tolist()]
        parts = in_turn(weight, factor.upper, zip(sizes, solvers, strict=True))
        choice = (bits - self.grid.bits) // self.step + 1
        packed = Parts(tuple(part.packed for part in parts), choice=choice, choices=3)
        paper = float(self.grid.bits)
        return Solution(packed.dequantize(), packed.bits(), packed, factor.damp, paper)

    def salience(
        self, weight: Float[Tensor, "rows columns"], upper: Float[Tensor, "columns columns"]
    ) -> Float[Tensor, " groups"]:
        """Σ w² / U_jj² over each group."""
        each = (weight / upper.diagonal()).double().square().sum(0)
        return torch.stack([part.sum() for part in each.split(self.grid.group_size or len(each))])

    def widths(self, salience: Float[Tensor, " groups"], pairs: int) -> Int[Tensor, " groups"]:
        """The bits of each group where `pairs` groups get more and as many less."""
        order = salience.argsort(stable=True)
        bits = torch.full_like(order, self.grid.bits)
        bits[order[:pairs]] -= self.step
        bits[order[len(order) - pairs :]] += self.step
        return bits

    def pairs(
        self,
        weight: Float[Tensor, "rows columns"],
        hessian: Float[Tensor, "columns columns"],
        upper: Float[Tensor, "columns columns"],
        salience: Float[Tensor, " groups"],
    ) -> int:
        """The best number of pairs by the metric; the first of equal ones."""
        tried = range(self.least, max(len(salience) // 2, self.least + 1))
        rounded = {step: self._rounded(weight, step * self.step) for step in (-1, 0, 1)}
        inputs = None if self.metric == "hessian" else self._drawn(hessian)
        found = []
        for count in tried:
            steps = (self.widths(salience, count) - self.grid.bits) // self.step
            chosen = [rounded[step][group] for group, step in enumerate(steps.tolist())]
            if inputs is None:
                found.append(self._error(weight, upper, chosen))
            else:
                found.append(divergence(inputs, torch.cat(chosen, 1), weight))
        return tried[found.index(min(found))]

    def _grid(self, bits: int) -> IntGrid:
        """The grid of one group of these bits."""
        one = replace(self.grid, group_size=None)
        if bits > 1:
            return replace(one, bits=bits)
        free = replace(one, symmetric=False, narrow=False, include_zero=False, real_zero=True)
        return replace(free, bits=1, range=TwoValues(self.centred))

    def _groups(self, weight: Float[Tensor, "rows columns"]) -> tuple[Tensor, ...]:
        return weight.split(self.grid.group_size or weight.shape[1], 1)

    def _rounded(self, weight: Float[Tensor, "rows columns"], more: int) -> list[Tensor]:
        """Every group rounded to nearest with this many bits more."""
        grid = self._grid(self.grid.bits + more)
        return [grid(part) for part in self._groups(weight)]

    def _error(
        self,
        weight: Float[Tensor, "rows columns"],
        upper: Float[Tensor, "columns columns"],
        chosen: list[Float[Tensor, "rows size"]],
    ) -> float:
        """The error that later groups do not make up for."""
        total, first = 0.0, 0
        for part, rounded in zip(self._groups(weight), chosen, strict=True):
            here, first = slice(first, first + part.shape[1]), first + part.shape[1]
            total += float(((rounded - part).double() @ left_factor(upper, here)).square().sum())
        return total

    def _drawn(self, hessian: Float[Tensor, "columns columns"]) -> Float[Tensor, "tokens columns"]:
        """Inputs with second moments H / 2, the factor that H = 2/N Σ x xᵀ has."""
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(self.tokens, len(hessian), generator=generator, dtype=torch.float64)
        values, vectors = torch.linalg.eigh(hessian.double().cpu() / 2)
        drawn = noise * values.clamp(min=0).sqrt() @ vectors.T
        return drawn.to(hessian)


def divergence(
    inputs: Float[Tensor, "tokens columns"],
    rounded: Float[Tensor, "rows columns"],
    weight: Float[Tensor, "rows columns"],
) -> float:
    """KL(softmax of rounded outputs ‖ softmax of float ones) over a token's outputs, both at least
    1e-6, as a mean over tokens."""
    ours, theirs = ((inputs @ each.T).softmax(1).clamp(min=1e-6) for each in (rounded, weight))
    return float((ours * (ours / theirs).log()).sum(1, dtype=torch.float64).mean())
