"""Statistics of the inputs of a block's linears, and the output error of changes to them."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from qexp.common import collectives
from qexp.common.collectives import WHOLE, Share
from qexp.grid import Grid
from qexp.quantizers.scheme import Activations
from qexp.transforms.channels import Channels
from qexp.transforms.race import least, mixed
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
    per_token: the module maps each token alone, as an MLP does.
    moment: Σ x xᵀ, on and above the diagonal, instead of them where `module` is the only linear: it
    determines the output error if weights are rounded and inputs are not.
    share: of the tokens that the calls are of; `low`, `high`, `total` and `tokens` are of all, from
    `merge` on.
    """

    channels: Channels
    module: nn.Module
    per_token: bool
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

        A single change is returned without evaluation. margin: of `race.least`; below inf only
        where `activation` rounds each token alone.
        """
        if len(changes) == 1:
            return changes[0]
        if self.moment is not None:
            return changes[self._least_by_moment(self.moment, changes, grid, margin)]
        if independent := margin < inf and self.per_token:
            self._mix_tokens()
        counts = self.share.gathered(len(self.calls))
        # A mixed part has tokens of every process, another part those of one.
        before = sum(counts[: collectives.rank()]) if self.share.divided and not independent else 0
        parts = max(counts) if independent else sum(counts)
        mine = range(before, before + len(self.calls))

        def errors(index: int, parts: Sequence[int]) -> list[Tensor]:
            own = [part for part in parts if part in mine]
            places = [part - before for part in own]
            found = self.errors(changes[index], places, grid, activation)
            every = self.share.gathered(dict(zip(own, _on_host(found), strict=True)))
            return [torch.cat([each[part] for each in every if part in each]) for part in parts]

        return changes[least(errors, len(changes), parts, margin, independent)]

    def errors(
        self, change: ScaleShift, parts: Sequence[int], grid: Grid, activation: Activations
    ) -> list[Float[Tensor, " tokens"]]:
        """The squared output error of the module at each token, in each of the recorded calls
        `parts`."""
        found = []
        with _rounded(self.channels, change, grid, activation):
            for part in parts:
                (args, kwargs), output = self.calls[part], self.outputs[part]
                difference = first_of(self.module(*args, **kwargs)).float() - output.float()
                found.append(difference.flatten(0, -2).square_().sum(1, dtype=torch.float64))
        return found

    def _mix_tokens(self) -> None:
        """Makes the recorded calls those of the parts of `race.mixed` over the tokens of all
        processes, with this one's tokens of each. Each whole is released once its copy exists, as
        both may be large."""
        own = [output.float().square().sum(-1).flatten() for output in self.outputs]
        sizes = self.share.gathered(torch.cat(own) if own else torch.zeros(0))
        first = sum(map(len, sizes[: collectives.rank()])) if self.share.divided else 0
        parts = [part - first for part in mixed(torch.cat(sizes))]
        if not self.calls:
            return
        inputs = torch.cat([call.args[0].flatten(0, -2) for call in self.calls])
        self.calls = []
        results = torch.cat([output.flatten(0, -2) for output in self.outputs])
        self.outputs = []
        parts = [part[(part >= 0) & (part < len(inputs))].to(inputs.device) for part in parts]
        self.outputs = [results[part][None] for part in parts]
        del results
        self.calls = [Call((inputs[part][None],), {}) for part in parts]

    def _least_by_moment(
        self, given: Tensor, changes: Sequence[ScaleShift], grid: Grid, margin: float
    ) -> int:
        # A triangular matrix of the same quadratic form: no mirrored copy.
        moment = given.triu(1).mul_(2).diagonal_scatter(given.diagonal())
        weight = self.channels.linears[0].weight.float()
        rows = mixed((weight @ moment).mul_(weight).sum(1))

        def errors(index: int, parts: Sequence[int]) -> list[Tensor]:
            own = [rows[part] for part in parts]
            found = self.moment_errors(changes[index], moment, grid, torch.cat(own))
            return list(found.split([len(part) for part in own]))

        return least(errors, len(changes), len(rows), margin, largest_first=True)

    def moment_errors(
        self,
        change: ScaleShift,
        moment: Float[Tensor, "columns columns"],
        grid: Grid,
        rows: Int[Tensor, " part"],
    ) -> Float[Tensor, " part"]:
        """The squared error over all tokens of these outputs of the only linear, diag(Δ M Δᵀ).

        moment: M, Σ x xᵀ or any matrix with the same quadratic form.
        """
        [linear], scale = self.channels.linears, self.channels.spread(change.scale)
        weight = linear.weight[rows].float()
        if grid.rowwise:
            rounded = grid(weight * scale)
        else:
            rounded = grid(linear.weight.float() * scale)[rows]
        moved = (rounded / scale).sub_(weight)
        return (moved @ moment).mul_(moved).sum(1, dtype=torch.float64)


def _on_host(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor.cpu() for tensor in tensors]


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


def first_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
