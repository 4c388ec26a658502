"""Quadapter (2211.16912), phase 2: channel scales trained on the task's loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from qexp.common.errors import check_choice
from qexp.data.recipe import Recipe
from qexp.methods.finetune import FineTune
from qexp.quantizers.channel_scale import Alpha
from qexp.quantizers.scheme import Activations
from qexp.step import Record, Step
from qexp.task import Batches, Task
from qexp.transforms.channels import SITES, Channels, channels_of


@dataclass(frozen=True)
class EndToEnd(Step):
    """Put alpha = exp(theta), initially 1, on the channels of every block, train it as `training`
    says (`trained.channels`) with rounding of the folded weights, and fold the result."""

    training: FineTune
    sites: str = "norms"

    def __post_init__(self) -> None:
        check_choice("method", self, sites=SITES)

    @property
    def activations(self) -> Sequence[Activations]:
        """Schemes whose quantizers a reloaded run attaches again."""
        return self.training.activations

    def recipes(self) -> Mapping[str, Recipe]:
        return self.training.recipes()

    def __call__(self, task: Task, batches: Batches) -> list[Record]:
        sites = self.install(task)
        try:
            return self.training(task, batches)
        finally:
            for channels in sites:
                channels.bake()

    def install(self, task: Task) -> list[Channels]:
        """Put an alpha on each site of every block."""
        blocks = range(len(task.blocks))
        sites = [
            channels
            for index in blocks
            for channels in channels_of(task, index, self.sites, "method.sites")
        ]
        for channels in sites:
            channels.install(Alpha(torch.zeros_like(channels.weights())))
        return sites
