"""Statistics of the inputs of a block's linears, and search for the best channel scale."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qexp.common.errors import UserError, check_int
from qexp.grid import Grid
from qexp.quantizers.scheme import Activations
from qexp.task import Batch, Task
from qexp.transforms.channels import Channels, channels_of
from qexp.walk import Block, walk
from qexp.walk.capture import Call


class ScaleShift(NamedTuple):
    """A scale and a shift to fold."""

    scale: Float[Tensor, " channels"]
    shift: Float[Tensor, " channels"] | None = None


@dataclass
class SiteStatistics:
    """Statistics per column of the input of one group's linears, over all calibration tokens.

    module: the smallest one that contains the linears (attention, MLP, or the linear itself).
    calls, outputs: its recorded calls and what it returned, for `best`.
    """

    channels: Channels
    module: nn.Module
    low: Tensor = field(default_factory=lambda: torch.tensor(torch.inf))
    high: Tensor = field(default_factory=lambda: torch.tensor(-torch.inf))
    total: Tensor = field(default_factory=lambda: torch.tensor(0.0))
    tokens: int = 0
    calls: list[Call] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)

    def add(self, x: Float[Tensor, "*tokens columns"]) -> None:
        x = x.detach().flatten(0, -2).float()
        self.low = torch.minimum(self.low.to(x.device), x.amin(0))
        self.high = torch.maximum(self.high.to(x.device), x.amax(0))
        self.total = self.total.to(x.device) + x.abs().sum(0)
        self.tokens += len(x)

    @property
    def largest(self) -> Float[Tensor, " channels"]:
        """The largest magnitude in each channel."""
        return self.channels.gather(torch.maximum(-self.low, self.high))

    @property
    def mean(self) -> Float[Tensor, " channels"]:
        """The mean magnitude in each channel."""
        return self.channels.gather(self.total / self.tokens)

    @property
    def ends(self) -> tuple[Float[Tensor, " channels"], Float[Tensor, " channels"]]:
        return -self.channels.gather(-self.low), self.channels.gather(self.high)

    def best(
        self, changes: Sequence[ScaleShift], grid: Grid, activation: Activations
    ) -> ScaleShift:
        """The change with the smallest output error of the module after quantization.

        A single change is returned without evaluation.
        """
        if len(changes) == 1:
            return changes[0]
        errors = [self._error(change, grid, activation) for change in changes]
        return changes[errors.index(min(errors))]

    def _error(self, change: ScaleShift, grid: Grid, activation: Activations) -> float:
        error = 0.0
        with _rounded(self.channels, change, grid, activation):
            for (args, kwargs), output in zip(self.calls, self.outputs, strict=True):
                difference = _first(self.module(*args, **kwargs)).float() - output.float()
                error += float(difference.square().sum(dtype=torch.float64))
        return error


@torch.no_grad()
def search_and_fold(
    task: Task,
    batches: Sequence[Batch],
    sites: str,
    propose: Callable[[SiteStatistics], list[ScaleShift]],
    grid: Grid,
    activation: Activations,
    searched: bool,
) -> None:
    """Folds, at each site of each block, the best change that `propose` returns.

    searched: whether `propose` may return several.
    """
    for block in walk(task, batches):
        statistics = collect_statistics(block, channels_of(task, block.index, sites), searched)
        with on_device(block):
            for site in statistics:
                change = site.best(propose(site), grid, activation)
                site.channels.fold(change.scale, change.shift)


def collect_statistics(
    block: Block, sites: Iterable[Channels], replay: bool
) -> list[SiteStatistics]:
    """Runs the block once and collects statistics at each site.

    The outputs are the next block's inputs, as folded changes do not change the block's function.
    replay: also record the calls that `SiteStatistics.best` needs.
    """
    statistics = [SiteStatistics(channels, _container(block, channels)) for channels in sites]
    with ExitStack() as hooks:
        for each in statistics:
            hooks.enter_context(_observed(each, replay))
        block.settle(list(block.outputs()))
    return statistics


@contextmanager
def on_device(block: Block) -> Iterator[None]:
    """Moves the block to the task's device for the context, so that its parts can be called."""
    home = next(block.module.parameters()).device
    block.module.to(block.task.device)
    try:
        yield
    finally:
        block.module.to(home)


def first(batches: Iterable[Batch], sequences: int | None) -> list[Batch]:
    """The first `sequences` sequences of each batch; all if None."""
    return [{key: value[:sequences] for key, value in batch.items()} for batch in batches]


def _container(block: Block, channels: Channels) -> nn.Module:
    """The module whose output error is measured.

    This is the linear itself if its producer is a linear, and otherwise the parent of the linears.
    """
    if len(channels.linears) == 1 and isinstance(channels.producer, nn.Linear):
        return channels.linears[0]
    names = {module: name for name, module in block.module.named_modules()}
    path = names[channels.linears[0]].rpartition(".")[0]
    return block.module.get_submodule(path) if path else channels.linears[0]


@contextmanager
def _observed(site: SiteStatistics, replay: bool) -> Iterator[None]:
    def input_hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        site.add(args[0])

    def output_hook(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        site.calls.append(Call(args, kwargs))
        site.outputs.append(_first(output))

    handles = [site.channels.linears[0].register_forward_pre_hook(input_hook)]
    if replay:
        handles.append(site.module.register_forward_hook(output_hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _rounded(
    channels: Channels, change: ScaleShift, grid: Grid, activation: Activations
) -> Iterator[None]:
    """Gives the linears the weights Q_w(W s), the biases b + W z and the inputs Q_a((x - z) / s).

    So the module's recorded calls, with inputs x, can be replayed as after folding and rounding.
    """
    scale = channels.spread(change.scale)
    shift = torch.zeros_like(scale) if change.shift is None else channels.spread(change.shift)

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (activation.rounded((args[0].float() - shift) / scale).to(args[0]), *args[1:])

    biases = [linear.bias for linear in channels.linears]
    for linear, bias in zip(channels.linears, biases, strict=True):
        linear.bias = None if bias is None else nn.Parameter(bias.detach(), False)
    floats = [linear.weight.data for linear in channels.linears]
    channels.shift_into(change.shift)
    handles = [linear.register_forward_pre_hook(hook) for linear in channels.linears]
    for linear, weight in zip(channels.linears, floats, strict=True):
        linear.weight.data = grid(weight.float() * scale).to(weight)
    try:
        yield
    finally:
        for linear, weight, bias, handle in zip(
            channels.linears, floats, biases, handles, strict=True
        ):
            linear.weight.data, linear.bias = weight, bias
            handle.remove()


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def smoothed(
    inputs: Float[Tensor, " channels"], weights: Float[Tensor, " channels"], alpha: float
) -> Float[Tensor, " channels"]:
    """The scale for channels whose inputs and weights reach so far; 1 where either is dead."""
    scale = inputs.pow(alpha) / weights.pow(1 - alpha)
    return torch.where((inputs > 0) & (weights > 0), scale.clamp(1e-5, 1e5), 1.0)


def check_settings(settings: Any) -> None:
    """UserError unless a transform's `grid` is one, and `sequences` are all or at least 1."""
    if not isinstance(settings.grid, Grid):
        raise UserError(
            f"transform.grid={settings.grid}: a grid is needed here; leave transform.grid out and "
            "choose one for weights, for example weight=int."
        )
    if settings.sequences is not None:
        check_int("transform", settings, sequences=1)
