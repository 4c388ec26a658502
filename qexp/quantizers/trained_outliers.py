"""A few weights that stay in floating point and train, next to constant codes (PreQuant)."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qexp.common.errors import check_choice, check_int, check_range
from qexp.grid import Grid
from qexp.grid.scale import DTYPES
from qexp.packed.coded import Coded
from qexp.quantizers.fake_quantize import FakeQuantize
from qexp.quantizers.scale_rules import ScaleRule
from qexp.quantizers.weight import FakeWeight, FloatOutliers


@dataclass(frozen=True)
class TrainedOutliers(ScaleRule):
    """Codes and scales of round-to-nearest that never change, and a few weights in floating point,
    which train (PreQuant, 2306.00014).

    share: of a matrix' weights. by: the largest of which they are, `magnitude` or rounding `error`,
    or `random`. Ranges are fitted to the other weights. dtype: of storage.
    """

    share: float | int = 0.005
    by: str = "magnitude"
    dtype: str = "float16"
    seed: int = 0
    trains_scales = False

    def __post_init__(self) -> None:
        check_range(None, self, "a number from 0 to 1", lambda x: 0 <= x <= 1, "share")
        check_choice(None, self, by=("magnitude", "error", "random"), dtype=DTYPES)
        check_int(None, self, seed=0)

    def __call__(
        self, weight: Float[Tensor, "rows columns"], grid: Grid, fake_quantize: FakeQuantize
    ) -> FakeWeight:
        weight = weight.detach().float()
        mask = self._chosen(weight, grid)
        kept = ~mask.reshape(len(weight), grid.groups(weight.shape[1]), -1)
        kept |= ~kept.any(-1, keepdim=True)  # a group of outliers alone has a range all the same
        counts = kept.reshape(weight.shape).float() if mask.any() else None
        start = Coded.of(grid, weight, grid.scales_of(weight, counts))
        return FloatOutliers(start, weight, mask, self.dtype)

    def _chosen(
        self, weight: Float[Tensor, "rows columns"], grid: Grid
    ) -> Bool[Tensor, "rows columns"]:
        """The mask of the outliers."""
        if self.by == "random":
            generator = torch.Generator().manual_seed(self.seed)
            score = torch.rand(weight.shape, generator=generator).to(weight.device)
        else:
            score = (weight if self.by == "magnitude" else grid(weight) - weight).abs()
        mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
        mask[score.flatten().topk(round(self.share * weight.numel())).indices] = True
        return mask.reshape(weight.shape)
