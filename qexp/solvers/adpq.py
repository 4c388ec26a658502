"""AdpQ (Ghaffari et al., 2405.13358): outliers by magnitude, on a grid of their own."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.common.errors import check_range
from qexp.grid import Grid
from qexp.packed.coded import Coded
from qexp.packed.masked import Masked
from qexp.solvers.base import Solution
from qexp.solvers.rtn import OnGrid


@dataclass(frozen=True)
class AdpQ(OnGrid):
    """Round-to-nearest with two scales per group: of its outliers and of its other weights.

    The paper's adaptive LASSO shrinks w to sign(w) max(|w| - λ/|w|, 0), which leaves those with
    w² > λ; λ is chosen so that their share is `outliers`. So they are the largest of the matrix.

    grid: of both; in the paper symmetric, with groups of 128. A group's other weights count as
    zeros when it is fitted, which change nothing for a range that holds 0.
    outliers: their share of the matrix.
    """

    grid: Grid
    outliers: float | int = 0.05

    def __post_init__(self) -> None:
        right = "a share from 0 to below 1"
        check_range("method.solver", self, right, lambda x: 0 <= x < 1, "outliers")

    @property
    def rowwise(self) -> bool:
        return False  # outliers are those of all rows

    def __call__(
        self,
        weight: Float[Tensor, "rows columns"],
        hessian: Float[Tensor, "columns columns"] | None = None,
    ) -> Solution:
        weight = weight.float()
        size = weight.flatten().abs()
        largest = size.topk(round(self.outliers * len(size))).indices
        mask = torch.zeros_like(size, dtype=torch.bool).index_fill_(0, largest, True)
        mask = mask.reshape(weight.shape)
        inside, outside = (
            Coded.of(self.grid, part, self.grid.scales_of(part))
            for part in (weight.masked_fill(~mask, 0), weight.masked_fill(mask, 0))
        )
        packed = Masked(mask, inside, outside)
        return Solution(packed.dequantize(), packed.bits(), packed)
