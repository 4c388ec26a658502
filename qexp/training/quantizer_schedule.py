"""Schedules of quantizers in training: when they round, which ranges, what a step leaves."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qexp.common.errors import FieldError, UserError, check_choice, check_range
from qexp.grid.ranges import MovingAverage
from qexp.quantizers.activation import FakeQuant
from qexp.quantizers.annealed import stochastic
from qexp.quantizers.parametrization import weight_quantizer
from qexp.quantizers.scale_rules import ScaleRule, Static
from qexp.task import Task
from qexp.training.trainer import Trainer

UPDATES: Mapping[str, Callable[[Tensor], Tensor] | None] = {
    "latent": None,
    "nearest": torch.round,
    "stochastic": stochastic,
}


@dataclass(frozen=True)
class QuantizerSchedule:
    """What changes of rounding while a model trains.

    activation_start: share of the steps before activations are rounded (Jacob et al., 1712.05877).
    running_ranges: static ranges of activations follow a moving average of the batches' extremes,
    which starts with the first batch, and do not train. update: `latent`, the optimizer moves float
    weights behind the codes; `nearest` and `stochastic`, each step ends on the grid, so that there
    are none (1706.02379: R and SR).
    """

    activation_start: float | int = 0.0
    running_ranges: bool = False
    update: str = "latent"

    def __post_init__(self) -> None:
        check_range(None, self, "a number from 0 to 1", lambda x: 0 <= x <= 1, "activation_start")
        check_choice(None, self, update=UPDATES)

    def check(self, scale: ScaleRule, trainer: Trainer) -> None:
        """FieldError for what the other parts of a training method rule out."""
        if self.update != "latent" and not isinstance(scale, Static):
            raise FieldError(
                f"schedule.update={self.update}: weights stay on one grid, and "
                f"{type(scale).__name__} moves it; give method/scale=static."
            )
        alone = self.update != "latent" or self.running_ranges
        if alone and (trainer.devices != 1 or trainer.recompute):
            raise FieldError(
                "schedule: running ranges and weights on the grid are of one process and one "
                "forward pass; give trainer.devices=1 trainer.recompute=false."
            )

    def begin(self, task: Task, linears: Sequence[nn.Linear]) -> "Scheduled":
        """Prepare the quantizers that `FineTune.install` attached."""
        quantizers = [q for q in task.quantizers.values() if isinstance(q, FakeQuant)]
        running = [q for q in quantizers if not q.dynamic] if self.running_ranges else []
        for quantizer in running:
            if not isinstance(quantizer.grid.range, MovingAverage) or quantizer.per_row:
                raise UserError(
                    "method.schedule.running_ranges=true: ranges of activations are moving "
                    "averages; give activation/grid/range=moving_average."
                )
            quantizer.follow()
        scheduled = Scheduled(self, linears, quantizers, [q.notes for q in running])
        scheduled.settle()
        return scheduled


@dataclass(frozen=True)
class Scheduled:
    """The quantizers of a model in training. notes: state of running ranges, for checkpoints."""

    schedule: QuantizerSchedule
    linears: Sequence[nn.Linear]
    quantizers: Sequence[FakeQuant]
    notes: Sequence[dict[str, Any]]

    def before_step(self, step: int, steps: int) -> None:
        for linear in self.linears:
            weight_quantizer(linear).before_step(step, steps)
        rounds = step >= self.schedule.activation_start * steps
        for quantizer in self.quantizers:
            quantizer.before_step(step, steps)
            quantizer.enabled = rounds

    def after_step(self) -> None:
        for linear in self.linears:
            weight_quantizer(linear).after_step()
        self.settle(UPDATES[self.schedule.update])

    @torch.no_grad()
    def settle(self, rounding: Callable[[Tensor], Tensor] | None = torch.round) -> None:
        """Put the weights on the grid, unless there are latent ones."""
        if rounding is None or self.schedule.update == "latent":
            return
        for linear in self.linears:
            chain: Any = linear.parametrizations["weight"]  # type: ignore[index]
            weight = chain.original
            rounded = weight_quantizer(linear)
            q = rounded.scales(weight).map(lambda part: part.reshape(-1, 1))
            groups = weight.reshape(len(q.scale), -1)
            weight.copy_(rounded.grid.round(groups, q, rounding).reshape(weight.shape))
