"""Activation quantization schemes: placement, grid, static or dynamic ranges; calibration."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qexp.common.progress import bar
from qexp.grid import Grid
from qexp.grid.clipping import Rounding
from qexp.quantizers.activation import FakeQuant
from qexp.quantizers.placement import Placement
from qexp.task import Batches, Task, singly


class Activations(ABC):
    @abstractmethod
    def put(self, task: Task) -> dict[str, FakeQuant]:
        """Attach quantizers to the task's model; none rounds before its range is fixed."""

    @abstractmethod
    def rounded(self, x: Tensor, rounding: Rounding = torch.round) -> Tensor:
        """The tensor as the quantizers will round it, with scales of the tensor itself.

        This is what a transform optimises for. Differentiable, scales included, if `rounding` is.
        """


@dataclass(frozen=True)
class FloatActivations(Activations):
    """No quantization of activations."""

    def put(self, task: Task) -> dict[str, FakeQuant]:
        return {}

    def rounded(self, x: Tensor, rounding: Rounding = torch.round) -> Tensor:
        return x


@dataclass(frozen=True)
class QuantizedActivations(Activations):
    """A quantizer at every site of `placement`.

    dynamic: scales of each tensor as it comes; otherwise fitted once to calibration batches.
    """

    placement: Placement
    grid: Grid
    dynamic: bool = False

    def put(self, task: Task) -> dict[str, FakeQuant]:
        made = self.placement(task, lambda: FakeQuant(self.grid, self.dynamic))
        return {name: q for name, q in made.items() if isinstance(q, FakeQuant)}

    def rounded(self, x: Tensor, rounding: Rounding = torch.round) -> Tensor:
        return self.grid(x.reshape(-1, x.shape[-1]).float(), rounding).reshape(x.shape).to(x.dtype)


def attach(task: Task, kinds: Sequence[Activations]) -> list[FakeQuant]:
    """Attach the quantizers of every scheme to the model and list them in `task.quantizers`."""
    made = {name: quantizer for kind in kinds for name, quantizer in kind.put(task).items()}
    for name, quantizer in made.items():
        task.quantizers[name.replace(".", "/")] = quantizer.to(task.device)
    return list(made.values())


@torch.no_grad()
def quantize_activations(task: Task, kinds: Sequence[Activations], batches: Batches) -> None:
    """Attach, let the calibration data pass once through what is still a float model (static
    ranges are those of unrounded activations), and start to round."""
    quantizers = attach(task, kinds)
    if any(not quantizer.dynamic for quantizer in quantizers):
        for quantizer in quantizers:
            quantizer.start_observing()
        for part in bar(singly(batches()), "activation ranges"):
            task.loss(part)
    for quantizer in quantizers:
        quantizer.fix_range()
