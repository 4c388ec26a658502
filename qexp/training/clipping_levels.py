"""The reach of activation quantizers as a penalty (PACT, 1805.06085)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.common.errors import check_finite
from qexp.quantizers.activation import FakeQuant
from qexp.task import Task
from qexp.training.losses import Penalty, Watch


@dataclass(frozen=True)
class ClippingLevels(Penalty):
    """`weight` times the sum of squared clipping levels over the activation quantizers whose ranges
    train; a level is the magnitude from which on one clips. Dynamic quantizers have none."""

    weight: float | int = 1e-4

    def __post_init__(self) -> None:
        check_finite(None, self, "weight")

    @contextmanager
    def watch(self, task: Task) -> Iterator[Watch]:
        found = [each for each in task.quantizers.values() if isinstance(each, FakeQuant)]
        yield Levels(self.weight, found)


class Levels(Watch):
    def __init__(self, weight: float | int, quantizers: Sequence[FakeQuant]) -> None:
        self.weight, self.quantizers = weight, quantizers

    def take(self, loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
        found = [level(each) for each in self.quantizers if each.scale.requires_grad]
        if not found or not torch.is_grad_enabled():  # validation: the loss is what is compared
            return loss.new_zeros(())
        return self.weight * torch.stack(found).square().sum().to(loss)


def level(quantizer: FakeQuant) -> Float[Tensor, ""]:
    """The magnitude that the grid reaches to, on the side where it reaches further."""
    q = quantizer.place()
    low, high = quantizer.grid.bounds
    return (q.scale * torch.maximum(q.zero - low, high - q.zero)).amax()
