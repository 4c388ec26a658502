"""Statistics of the inputs of a block's linears, and the output error of changes to them."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import inf
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qexp.common import collectives
from qexp.common.collectives import WHOLE, Share
from qexp.grid import Grid
from qexp.quantizers.scheme import Activations
from qexp.transforms.channels import Channels
from qexp.transforms.race import least
from qexp.walk import Block
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
    moment: Σ x xᵀ, on and above the diagonal, instead of them where `module` is the only linear: it
    determines the output error if weights are rounded and inputs are not.
    share: of the tokens that the calls are of; `low`, `high`, `total` and `tokens` are of all, from
    `merge` on.
    """

    channels: Channels
    module: nn.Module
    moment: Tensor | None = None
    low: Tensor = field(default_factory=lambda: torch.tensor(torch.inf))
    high: Tensor = field(default_factory=lambda: torch.tensor(-torch.inf))
    total: Tensor = field(default_factory=lambda: torch.tensor(0.0))
    tokens: int = 0
    calls: list[Call] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    share: Share = WHOLE

    def merge(self) -> None:
        """Take in what the other processes have seen."""
        self.low = -self.share.max(-self.low)
        self.high = self.share.max(self.high)
        self.total = self.share.sum(self.total)
        self.tokens = sum(self.share.gathered(self.tokens))

    def add(self, x: Float[Tensor, "*tokens columns"]) -> None:
        x = x.detach().flatten(0, -2).float()
        self.low = torch.minimum(self.low.to(x.device), x.amin(0))
        self.high = torch.maximum(self.high.to(x.device), x.amax(0))
        self.total = self.total.to(x.device) + x.abs().sum(0)
        self.tokens += len(x)

    @property
    def is_linear(self) -> bool:
        """Whether the module is the only linear."""
        return self.channels.linears == (self.module,)

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
        self,
        changes: Sequence[ScaleShift],
        grid: Grid,
        activation: Activations,
        margin: float = inf,
    ) -> ScaleShift:
        """The change with the smallest output error of the module after quantization.

        A single change is returned without evaluation. margin: of `race.least`.
        """
        if len(changes) == 1:
            return changes[0]
        if self.moment is not None:
            moment = self.moment.triu(1).mul_(2).diagonal_scatter(self.moment.diagonal())
            by_moment = [self.moment_error(change, moment, grid) for change in changes]
            return changes[by_moment.index(min(by_moment))]
        counts = self.share.gathered(len(self.calls))
        before = sum(counts[: collectives.rank()]) if self.share.divided else 0
        mine = range(before, before + len(self.calls))

        def errors(index: int, parts: Sequence[int]) -> list[Tensor]:
            own = [part for part in parts if part in mine]
            places = [part - before for part in own]
            found = self.errors(changes[index], places, grid, activation)
            merged: dict[int, Tensor] = {}
            for each in self.share.gathered(dict(zip(own, _on_host(found), strict=True))):
                merged |= each
            return [merged[part] for part in parts]

        return changes[least(errors, len(changes), sum(counts), margin)]

    def errors(
        self, change: ScaleShift, parts: Sequence[int], grid: Grid, activation: Activations
    ) -> list[Float[Tensor, " tokens"]]:
        """The squared output error of the module at each token, in each of the recorded calls
        `parts`."""
        found = []
        with _rounded(self.channels, change, grid, activation):
            for part in parts:
                (args, kwargs), output = self.calls[part], self.outputs[part]
                difference = _first(self.module(*args, **kwargs)).float() - output.float()
                found.append(difference.flatten(0, -2).square_().sum(1, dtype=torch.float64))
        return found

    def moment_error(
        self, change: ScaleShift, moment: Float[Tensor, "columns columns"], grid: Grid
    ) -> float:
        """The squared output error of the only linear over all tokens, tr(Δ M Δᵀ).

        moment: M, Σ x xᵀ or any matrix with the same quadratic form.
        """
        [linear], scale = self.channels.linears, self.channels.spread(change.scale)
        weight = linear.weight.float()
        moved = (grid(weight * scale) / scale).sub_(weight)
        return float(torch.sum((moved @ moment).mul_(moved), dtype=torch.float64))


def collect_statistics(
    block: Block, sites: Iterable[Channels], replay: bool, moments: bool = False
) -> list[SiteStatistics]:
    """Runs the block once and collects statistics at each site.

    The outputs are the next block's inputs, as folded changes do not change the block's function.
    replay: also record the calls that `SiteStatistics.best` needs; moments: not where the module is
    a linear, since `SiteStatistics.moment` will be given.
    """
    statistics = [
        SiteStatistics(channels, _container(block, channels), share=block.share)
        for channels in sites
    ]
    with ExitStack() as hooks:
        for each in statistics:
            hooks.enter_context(_observed(each, replay and not (moments and each.is_linear)))
        block.settle(list(block.outputs()))
    for each in statistics:
        each.merge()
    return statistics


def _on_host(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor.cpu() for tensor in tensors]


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
    shift = None if change.shift is None else channels.spread(change.shift)

    last: list[tuple[Tensor, Tensor]] = []  # the input that the linears share is changed once

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not last or last[0][0] is not args[0]:
            x = args[0].float()
            x = x if shift is None else x - shift
            last[:] = [(args[0], activation.rounded(x / scale).to(args[0]))]
        return (last[0][1], *args[1:])

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
