"""Units of reconstruction: linears that train together, with the loss of their output."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qexp.grid import Grid
from qexp.hessian.float_stream import FloatInputs, FloatStream
from qexp.methods.block_losses import LOSSES
from qexp.methods.output_importance import output_importance
from qexp.methods.output_moments import OutputMoments
from qexp.methods.write_back import record
from qexp.packed.base import Packed
from qexp.quantizers.parametrization import weight_quantizer
from qexp.quantizers.scheme import float_activations
from qexp.step import Record
from qexp.walk import Block


class Unit(ABC):
    """Linears whose output is to be that of the float model on the float model's inputs.

    name: full. label: relative to the block, empty for the block. module: holds all parameters of
    the unit. linears: by their names in the block. pieces: mini-batches of its data. width: output
    channels.
    """

    name: str
    label: str
    module: nn.Module
    linears: Mapping[str, nn.Linear]
    pieces: int
    width: int

    def begin(self) -> None:  # noqa: B027 (optional)
        """Called when the quantizers are in place, before the first step."""

    def floats(self, which: str) -> Iterable[nn.Parameter]:
        """The float parameters of the unit: `all`, or its `norms`."""
        assert which == "all"
        return self.module.parameters()

    @abstractmethod
    def loss(self, piece: int) -> Float[Tensor, ""]:
        """The error of the output at the present parameters, a mean over tokens and channels."""

    def set_training(self, mode: bool) -> None:
        """Of the quantizers: soft clamps and soft rounding, or codes as they would be stored."""
        for linear in self.linears.values():
            weight_quantizer(linear).train(mode)

    def before_step(self, step: int, steps: int) -> None:
        """Of the quantizers: rounding as it is at a step, counted from 0, of `steps`."""
        for linear in self.linears.values():
            weight_quantizer(linear).before_step(step, steps)

    @torch.no_grad()
    def hard_loss(self) -> float:
        """The loss of the first piece with codes as they would be stored."""
        self.set_training(False)
        loss = float(self.loss(0))
        self.set_training(True)
        return loss

    @abstractmethod
    def records(self, grid: Grid, seconds: float) -> list[Record]:
        """Bake the trained weights. seconds: that training took."""


class Units(ABC):
    """The units of each block of a walk. float_inputs: units are trained on the inputs that they
    have in the float model, not on those that quantized units before them give. starts: what an
    earlier method stored for linears, by full name."""

    def __init__(self, float_inputs: bool) -> None:
        self.float_inputs = float_inputs
        self.starts: Mapping[str, Packed] = {}

    @abstractmethod
    def observe(self, block: Block) -> None:
        """Run the float model to the end of a block; for each in order, before it changes."""

    @abstractmethod
    def __call__(self, block: Block, train: Callable[[Unit], None]) -> None:
        """Call `train` with each unit of an observed block, in execution order."""


class Objective(NamedTuple):
    """What the output of a block is compared with, and how: see `BlockPhase`."""

    loss: str = "squares"
    targets: str = "float"
    is_weighted: bool = False


class WholeBlock(Unit):
    """A block and its output on chunks of sequences."""

    label = ""

    def __init__(
        self,
        block: Block,
        inputs: Sequence[Tensor],
        exact: Sequence[Tensor],
        objective: Objective,
    ) -> None:
        self.block, self.inputs, self.exact = block, inputs, exact
        self.name, self.module, self.linears = block.name, block.module, block.linears
        self.pieces, self.width = len(exact), exact[0].shape[-1]
        self.objective, self.weights = objective, list[Tensor]()

    def floats(self, which: str) -> Iterable[nn.Parameter]:
        if which == "all":
            return self.module.parameters()
        norms = (self.module.get_submodule(name) for name in self.block.task.arch.norms)
        return [parameter for norm in norms for parameter in norm.parameters()]

    def begin(self) -> None:
        if self.objective.is_weighted:
            for piece, exact in enumerate(self.exact):
                with torch.no_grad():
                    output = self._output(piece)
                self.weights.append(output_importance(self.block, piece, output, exact))

    def loss(self, piece: int) -> Float[Tensor, ""]:
        output, exact = self._output(piece).float(), self.exact[piece].float()
        if self.weights:
            return ((output - exact).square() * self.weights[piece]).mean()
        return LOSSES[self.objective.loss](output, exact)

    def records(self, grid: Grid, seconds: float) -> list[Record]:
        share = seconds / len(self.linears)
        return [
            record(f"{self.name}.{name}", linear, grid, share)
            for name, linear in self.linears.items()
        ]

    def _output(self, piece: int) -> Tensor:
        return self.block.replay(piece, self.inputs[piece].detach())


class WholeBlocks(Units):
    """Blocks (BRECQ, AutoRound, EfficientQAT)."""

    def __init__(self, float_inputs: bool, objective: Objective) -> None:
        super().__init__(float_inputs)
        self.objective = objective
        self._inputs: list[Tensor] = []
        self._exact: list[Tensor] = []

    def observe(self, block: Block) -> None:
        before = self._exact or block.inputs
        if self.objective.targets == "inputs" and not self.float_inputs:
            before = block.inputs
        with torch.no_grad(), float_activations(block.task):
            self._exact = [block.replay(n, hidden) for n, hidden in enumerate(before)]
        self._inputs = before if self.float_inputs else block.inputs
        if self.float_inputs:
            block.skip()

    def __call__(self, block: Block, train: Callable[[Unit], None]) -> None:
        train(WholeBlock(block, self._inputs, self._exact, self.objective))


class OneLinear(Unit):
    """A linear by the moments of its inputs: with D = Q - W, its output Q x̃ has the square distance
    tr(D own Dᵀ) + 2 <D, W moved> + tr(W gap Wᵀ) from W x."""

    pieces = 1

    def __init__(self, name: str, label: str, linear: nn.Linear, moments: OutputMoments) -> None:
        self.name, self.label, self.module = name, label, linear
        self.linear, self.linears = linear, {label: linear}
        self.width, self.moments = linear.out_features, moments
        self.exact = self._matrix(linear.weight).detach()
        self.shift = 2 * self.exact @ moments.moved
        self.constant = self._squares(self.exact, moments.gap)

    def loss(self, piece: int) -> Float[Tensor, ""]:
        return self._distance(self._matrix(self.linear.weight))

    @torch.no_grad()
    def records(self, grid: Grid, seconds: float) -> list[Record]:
        """Errors are shares of the float output's square."""
        scale = self._squares(self.exact, self.moments.exact()).clamp(min=1e-30)
        nearest = self.exact.clone()
        nearest[:, :-1] = grid(self.exact[:, :-1].contiguous())
        made = record(self.name, self.linear, grid, seconds)
        before = float(self._distance(nearest) / scale)
        after = float(self._distance(self._matrix(self.linear.weight)) / scale)
        return [replace(made, error_before=before, error=after)]

    def _matrix(self, weight: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows inputs"]:
        """The weight with the bias as its last column."""
        bias = self.linear.bias
        ended = torch.zeros_like(weight[:, :1]) if bias is None else bias[:, None]
        return torch.cat([weight, ended], 1).float()

    def _squares(self, matrix: Tensor, moment: Tensor) -> Float[Tensor, ""]:
        return (matrix @ moment * matrix).sum() / self.width

    def _distance(self, matrix: Float[Tensor, "rows inputs"]) -> Float[Tensor, ""]:
        change = matrix - self.exact
        moved = change @ self.moments.own + self.shift
        return (moved * change).sum() / self.width + self.constant


class EachLinear(Units):
    """Linears (AdaRound, AdaQuant), each after the groups before it in its block were rounded."""

    def __init__(self, float_inputs: bool) -> None:
        super().__init__(float_inputs)
        self._stream = FloatStream()
        self._floats: FloatInputs = {}

    def observe(self, block: Block) -> None:
        self._floats = self._stream.inputs(block)
        if self.float_inputs:
            block.skip()

    def __call__(self, block: Block, train: Callable[[Unit], None]) -> None:
        linears = block.linears

        def on_inputs(names: tuple[str, ...], inputs: Iterator[Tensor]) -> None:
            moments = OutputMoments.of(inputs, self._floats[names])
            for name in names:
                train(OneLinear(f"{block.name}.{name}", name, linears[name], moments))

        if self.float_inputs:
            for names, inputs in self._floats.items():
                on_inputs(names, iter(inputs))
        else:
            block.advance(on_inputs)


UNITS: dict[str, Callable[[bool, Objective], Units]] = {
    "block": WholeBlocks,
    "linear": lambda float_inputs, objective: EachLinear(float_inputs),
}
