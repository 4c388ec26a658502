"""Random channel scales: another float model with the same function."""

from dataclasses import dataclass

import torch

from qexp.common.errors import check_choice, check_finite, check_int
from qexp.step import Record, Step
from qexp.task import Batches, Task
from qexp.transforms.channels import SITES, channels_of


@dataclass(frozen=True)
class Rescale(Step):
    """s = exp(spread · u) per channel, u uniform on [-1, 1), folded at `sites`.

    Columns of the linears are multiplied by s and their producers divided by it, so that the
    function stays and columns that shared a quantization step in the file have steps of their own.
    """

    spread: float | int = 0.25  # logarithm of the largest scale
    sites: str = "norms+value+up"
    seed: int = 0

    def __post_init__(self) -> None:
        check_finite(None, self, "spread")
        check_choice(None, self, sites=SITES)
        check_int(None, self, seed=0)

    @torch.no_grad()
    def __call__(self, task: Task, batches: Batches) -> list[Record]:
        generator = torch.Generator().manual_seed(self.seed)
        for index in range(len(task.blocks)):
            for channels in channels_of(task, index, self.sites):
                largest = channels.weights()
                uniform = 2 * torch.rand(len(largest), generator=generator).double() - 1
                # Rounded from float64, whose last digit is all in which machines' exp differ.
                scale = (self.spread * uniform).exp().float()
                channels.fold(scale.to(largest.device))
        return []
