"""Cross-layer equalization (1906.04721) for transformers."""

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
    """s = √(r₁ / r₂) per channel, so that both ranges become √(r₁ r₂). Needs no data.

    r₁ is the producer's range (`reach`), r₂ the largest weight that reads the channel. Sites share
    linears, so the equalization is repeated for `rounds`.
    """

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
                    outputs, weights = reach(channels), channels.weights()
                    alive = (outputs > 0) & (weights > 0)
                    channels.fold(torch.where(alive, (outputs / weights).sqrt(), 1.0))
        return []


def reach(channels: Channels) -> Float[Tensor, " channels"]:
    """The range of each output channel of a producer, without data.

    It is the largest weight in the row of a linear, and |b| + 3 |w| for a norm, whose outputs have
    mean b and standard deviation w.
    """
    parameters = dict(channels.producer.named_parameters(recurse=False))
    weight = parameters["weight"].float()
    if weight.ndim == 2:
        return weight.abs().amax(1)
    spread = 3 * (weight + channels.offset).abs()
    return spread + parameters["bias"].float().abs() if "bias" in parameters else spread
