"""Cross-layer equalization (1906.04721), on the sites of transformers."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.common.errors import check_choice, check_int
from qexp.step import Record, Step
from qexp.task import Batches, Task
from qexp.transforms.channels import SITES, Channels, channels_of


@dataclass(frozen=True)
class Equalize(Step):
    """s = √(r₁ / r₂) for each channel, with r₁ how far its source reaches and r₂ its largest
    weight, so that both are √(r₁ r₂) after. No data. Sites share linears, hence `rounds`."""

    sites: str = "norms"
    rounds: int = 10

    def __post_init__(self) -> None:
        check_choice("transform", self, sites=SITES)
        check_int("transform", self, rounds=1)

    @torch.no_grad()
    def __call__(self, task: Task, batches: Batches) -> list[Record]:
        for index in range(len(task.blocks)):
            sites = channels_of(task, index, self.sites)
            for _ in range(self.rounds):
                for channels in sites:
                    made, weights = reach(channels), channels.weights()
                    alive = (made > 0) & (weights > 0)
                    channels.fold(torch.where(alive, (made / weights).sqrt(), 1.0))
        return []


def reach(channels: Channels) -> Float[Tensor, " channels"]:
    """How far each channel of a source reaches: the largest weight of a linear's row; for a norm,
    whose results have mean b and deviation w, |b| + 3 |w|."""
    parameters = dict(channels.producer.named_parameters(recurse=False))
    weight = parameters["weight"].float()
    if weight.ndim == 2:
        return weight.abs().amax(1)
    spread = 3 * (weight + channels.offset).abs()
    return spread + parameters["bias"].float().abs() if "bias" in parameters else spread
