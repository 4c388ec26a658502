"""Block-wise reconstruction: training of a few parameters of one block to match its float output.

The quantized block is trained to reproduce the output of the float block.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qexp.common.errors import UserError
from qexp.gradients import Straight
from qexp.quantizers.attention import CACHE, Inside, inserted
from qexp.quantizers.maps import shared_input
from qexp.quantizers.operands import attention_modules
from qexp.quantizers.placement import KVCache
from qexp.quantizers.scheme import Activations, QuantizedActivations
from qexp.task import Task
from qexp.transforms.channels import parametrized
from qexp.walk import Block

Rule = Callable[[Tensor], Tensor]
# What trains, by name. Those of one name are ends of the same ranges: a gradient of one will do.
Learned = Mapping[str, Sequence[nn.Parameter]]

LEAST = 0.5  # share of a parameter's channels that must receive a gradient; some inputs are dead


@contextmanager
def quantized(
    block: Block,
    rules: dict[str, Rule],
    activation: Activations,
    inputs: Sequence[nn.Module] | None = None,
) -> Iterator[None]:
    """Fake-quantizes every linear of the block: its weight by its rule, its input by `activation`,
    or by one of `inputs` for each group of linears.

    Scales of the input come from the input itself; gradients pass straight through the rounding.
    """
    with ExitStack() as stack:
        for name, linear in block.linears.items():
            stack.enter_context(parametrized(linear, "weight", Changed(rules[name])))
        stack.enter_context(rounded_inputs(block.task, block.index, activation, inputs))
        yield


@contextmanager
def rounded_inputs(
    task: Task, block: int, activation: Activations, quantizers: Sequence[nn.Module] | None = None
) -> Iterator[None]:
    """Within the context, the inputs of a block's linears are rounded, by one of `quantizers` for
    each group of linears if they are given."""
    inputs = [shared_input(task, block, group) for group in task.arch.groups]
    own = quantizers or [_Rounded(activation)] * len(inputs)
    for each, quantizer in zip(inputs, own, strict=True):
        each.quantizer = quantizer
    try:
        yield
    finally:
        for each in inputs:
            each.quantizer = None


@contextmanager
def rounded_cache(task: Task, blocks: Sequence[int], kv: Activations) -> Iterator[None]:
    """Within the context, keys and values of these blocks are rounded as a cache holds them;
    nothing where `kv` rounds other tensors."""
    if not rounds_cache(kv):
        yield
        return
    own = {operand: _Rounded(kv) for operand in CACHE}
    modules = [module for block in blocks for module in attention_modules(task, block)]
    with inserted(task.model, {module: Inside(dict(own)) for module in modules}):
        yield


def rounds_cache(kv: Activations) -> bool:
    """Whether keys and values are rounded as a cache holds them, and not elsewhere."""
    return isinstance(kv, QuantizedActivations) and isinstance(kv.placement, KVCache)


class _Rounded(nn.Module):
    def __init__(self, activation: Activations) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation.rounded(x, Straight())


class Changed(nn.Module):
    """A parametrization by a function, whose own parameters are registered elsewhere."""

    def __init__(self, change: Rule) -> None:
        super().__init__()
        self.change = (change,)  # not as a submodule

    def forward(self, value: Tensor) -> Tensor:
        return self.change[0](value).to(value)


@dataclass(frozen=True)
class Reconstruction:
    """Inputs and target outputs of a block by chunk. Several `targets` have equal weights.

    normalized: in training, each chunk's error is divided by its own value, so that gradients have
    the same scale in every block.
    """

    block: Block
    inputs: Sequence[Tensor]
    targets: Sequence[Sequence[Tensor]]
    normalized: bool = False

    def error(self, chunk: int) -> Float[Tensor, ""]:
        """The squared error, summed over channels and targets, averaged over tokens."""
        output = self.block.replay(chunk, self.inputs[chunk])
        targets = [each[chunk].to(output.device).float() for each in self.targets]
        errors = [(output.float() - target).square().sum(-1).mean() for target in targets]
        return torch.stack(errors).sum()

    @torch.no_grad()
    def total(self) -> float:
        """The mean error over all chunks with the current parameters."""
        return sum(float(self.error(n)) for n in range(len(self.inputs))) / len(self.inputs)

    def fit(
        self,
        optimizer: torch.optim.Optimizer,
        learned: Learned,
        steps: int,
        generator: torch.Generator,
        before_step: Callable[[int], None] = lambda step: None,
    ) -> None:
        """Train what the optimizer holds, a piece a step, in a new order every time round;
        `before_step` is called with the number of each.

        Raises UserError where too little of `learned` receives a gradient in the first round."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        reached = {p: torch.zeros_like(p, dtype=torch.bool) for p in parameters}
        order: list[int] = []
        with torch.enable_grad():
            for step in range(steps):
                order = order or torch.randperm(len(self.inputs), generator=generator).tolist()
                before_step(step)
                error = self.error(order.pop())
                if self.normalized:
                    error = error / error.detach()
                # Gradients of these alone: the model's own weights are frozen.
                gradients: Sequence[Tensor | None] = [None] * len(parameters)
                if error.requires_grad:
                    gradients = torch.autograd.grad(error, parameters, allow_unused=True)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient
                if step < len(self.inputs):
                    for p in parameters:
                        reached[p] |= False if p.grad is None else p.grad != 0
                if step == min(steps, len(self.inputs)) - 1:
                    _check(learned, reached)
                optimizer.step()


def _check(learned: Learned, reached: Mapping[nn.Parameter, Tensor]) -> None:
    for name, parameters in learned.items():
        some = torch.stack([reached[p] for p in parameters]).any(0)
        if (count := int(some.sum())) < LEAST * some.numel():
            raise UserError(
                f"transform: {name}: the block's error has a gradient for {count} of "
                f"{some.numel()} values, and at least {LEAST:.0%} must have one or nothing is "
                "learned; choose another weight grid, other sites, or more calibration data."
            )
