"""What one forward of a block tells of the tensors that its linears read, and how well a candidate
scale does on them."""

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
    """The input of the linears of one group, column by column, over all calibration tokens.

    module: the smallest one that holds the linears (attention, MLP, or the linear itself), with
    the calls that it received and what it returned.
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
        """The change after which rounding weights and inputs moves the module's output least; the
        only one without looking."""
        if len(changes) == 1:
            return changes[0]
        errors = [self._error(change, grid, activation) for change in changes]
        return changes[errors.index(min(errors))]

    def _error(self, change: ScaleShift, grid: Grid, activation: Activations) -> float:
        error = 0.0
        with _rounded(self.channels, change, grid, activation):
            for (args, kwargs), output in zip(self.calls, self.outputs, strict=True):
                moved = _first(self.module(*args, **kwargs)).float() - output.float()
                error += float(moved.square().sum(dtype=torch.float64))
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
    """Walk the blocks and fold, at each site, the best change that `propose` names. searched: it
    may name several."""
    for block in walk(task, batches):
        found = collect_statistics(block, channels_of(task, block.index, sites), searched)
        with on_device(block):
            for site in found:
                change = site.best(propose(site), grid, activation)
                site.channels.fold(change.scale, change.shift)


def collect_statistics(
    block: Block, sites: Iterable[Channels], replay: bool
) -> list[SiteStatistics]:
    """Run the block once and tell of each site. What comes out is what the next block receives:
    the caller changes no function. replay: keep what `Watched.best` needs."""
    found = [SiteStatistics(channels, _holder(block, channels)) for channels in sites]
    with ExitStack() as hooks:
        for each in found:
            hooks.enter_context(_listening(each, replay))
        block.settle(list(block.outputs()))
    return found


@contextmanager
def on_device(block: Block) -> Iterator[None]:
    """The block lies on the task's device, where its parts can run alone."""
    home = next(block.module.parameters()).device
    block.module.to(block.task.device)
    try:
        yield
    finally:
        block.module.to(home)


def first(batches: Iterable[Batch], sequences: int | None) -> list[Batch]:
    """The first so many sequences of each batch; None is all of them."""
    return [{key: value[:sequences] for key, value in batch.items()} for batch in batches]


def _holder(block: Block, channels: Channels) -> nn.Module:
    """A linear that reads another is judged by itself; those behind a norm by what they are for."""
    if len(channels.linears) == 1 and isinstance(channels.producer, nn.Linear):
        return channels.linears[0]
    names = {module: name for name, module in block.module.named_modules()}
    path = names[channels.linears[0]].rpartition(".")[0]
    return block.module.get_submodule(path) if path else channels.linears[0]


@contextmanager
def _listening(site: SiteStatistics, replay: bool) -> Iterator[None]:
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
    """The linears as folding and rounding will leave them, Q_w(W s) and b + W z, reading
    Q_a((x - z) / s) of the x that the module's recorded calls hold."""
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
