"""Channel scales: what makes a tensor divides its channels, what reads it multiplies them back.

With y the tensor, s and z a scale and a shift per channel: the source makes (y - z) / s, and the
linears have W diag(s) and b + W z. The model's function is unchanged; what is rounded is not.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qexp.arch import Arch, Group
from qexp.common.errors import UserError
from qexp.task import Task

log = logging.getLogger(__name__)

# What a scale or a shift is at the moment.
Follow = Callable[[], Float[Tensor, " channels"]]

SITES = ("norms", "norms+value", "norms+value+up")


@dataclass(frozen=True)
class Channels:
    """The channels that the linears of a group read, and the norm or linear that makes them.

    name: of the source. offset: what a norm adds to its weight. heads, repeats: a value head is
    read by so many query heads, hence one row of the values by so many columns of the output
    projection. shiftable: the source has a bias, and nothing but sums that weigh to 1 (attention)
    stands between.
    """

    name: str
    producer: nn.Module
    linears: tuple[nn.Linear, ...]
    offset: float = 0.0
    heads: int = 1
    repeats: int = 1
    shiftable: bool = False

    def spread(self, x: Float[Tensor, " channels"]) -> Float[Tensor, " columns"]:
        """From channels of the source to columns of the linears."""
        return x.reshape(self.heads, 1, -1).expand(-1, self.repeats, -1).flatten()

    def gather(self, x: Float[Tensor, " columns"]) -> Float[Tensor, " channels"]:
        """From columns to channels: the largest of those that share one."""
        return x.reshape(self.heads, self.repeats, -1).amax(1).flatten()

    def weights(self) -> Float[Tensor, " channels"]:
        """The largest magnitude among the weights that read each channel."""
        columns = torch.stack([linear.weight.detach().abs().amax(0) for linear in self.linears])
        return self.gather(columns.amax(0)).float()

    @torch.no_grad()
    def fold(
        self, scale: Float[Tensor, " channels"], shift: Float[Tensor, " channels"] | None = None
    ) -> None:
        """Change source and linears for good. A shift gives linears that have no bias one."""
        if not (scale.isfinite().all() and (scale > 0).all()):
            raise RuntimeError(f"{self.name}: a channel scale is not a positive number")
        self.shift_into(shift)
        for name, parameter in self.producer.named_parameters(recurse=False):
            parameter.data = self._made(name, _wide(parameter), scale, shift).to(parameter)
        self.multiply(scale)

    def shift_into(self, shift: Float[Tensor, " channels"] | None) -> None:
        """b + W z: the linears' half of a shift."""
        if shift is None:
            return
        for linear in self.linears:
            weight = _wide(linear.weight)
            moved = weight @ self.spread(shift).to(weight)
            _give_bias(linear)
            linear.bias.data = (_wide(linear.bias) + moved).to(linear.bias)

    def multiply(self, scale: Float[Tensor, " channels"]) -> None:
        """W diag(s): the linears' half of a scale."""
        for linear in self.linears:
            linear.weight.data = self._read(_wide(linear.weight), scale).to(linear.weight)

    @contextmanager
    def live(self, scale: Follow, shift: Follow | None = None) -> Iterator[None]:
        """Source and linears follow `scale` and `shift` as they change, gradients included, until
        the end of the context, when they are what they were."""
        with ExitStack() as stack:
            for module, name, change in self._followers(scale, shift):
                stack.enter_context(parametrized(module, name, change))
            yield

    def install(self, scale: Follow) -> None:
        """Source and linears follow `scale` from now on, until `settle`."""
        for module, name, change in self._followers(scale, None):
            parametrize.register_parametrization(module, name, change)

    def bake(self) -> None:
        """What follows a scale keeps the values that it has now; what was made plain already (a
        rounded weight) is left alone."""
        for module in (self.producer, *self.linears):
            for name in ("weight", "bias"):
                if parametrize.is_parametrized(module, name):
                    parametrize.remove_parametrizations(module, name, leave_parametrized=True)

    def _followers(
        self, scale: Follow, shift: Follow | None
    ) -> Iterator[tuple[nn.Module, str, nn.Module]]:
        for linear in self.linears:
            if shift is not None:
                _give_bias(linear)
                yield linear, "bias", _Moved(self, _wide(linear.weight), shift)
            yield linear, "weight", _Read(self, scale)
        # By name: a parameter that another site follows already is none of the module's own.
        for name in ("weight", "bias"):
            if getattr(self.producer, name, None) is not None:
                yield self.producer, name, _Made(self, name, scale, shift)

    def _made(self, name: str, value: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
        # In float32 at least, so that a half-precision model is judged by what will be folded.
        wide = torch.promote_types(value.dtype, torch.float32)
        x, scale = value.to(wide), scale.to(wide)
        if name == "bias":
            made = (x if shift is None else x - shift.to(wide)) / scale
        elif x.ndim == 2:
            made = x / scale[:, None]
        else:
            made = (x + self.offset) / scale - self.offset
        return made.to(value)

    def _read(self, weight: Tensor, scale: Tensor) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        return (weight.to(wide) * self.spread(scale).to(wide)).to(weight)


class _Made(nn.Module):
    def __init__(self, channels: Channels, name: str, scale: Follow, shift: Follow | None) -> None:
        super().__init__()
        self.channels, self.name, self.scale, self.shift = channels, name, scale, shift

    def forward(self, value: Tensor) -> Tensor:
        shift = None if self.shift is None else self.shift()
        return self.channels._made(self.name, value, self.scale(), shift)


class _Moved(nn.Module):
    def __init__(self, channels: Channels, weight: Tensor, shift: Follow) -> None:
        super().__init__()
        self.channels, self.weight, self.shift = channels, weight, shift

    def forward(self, bias: Tensor) -> Tensor:
        return bias + (self.weight @ self.channels.spread(self.shift()).to(self.weight)).to(bias)


class _Read(nn.Module):
    def __init__(self, channels: Channels, scale: Follow) -> None:
        super().__init__()
        self.channels, self.scale = channels, scale

    def forward(self, weight: Tensor) -> Tensor:
        return self.channels._read(weight, self.scale())


@contextmanager
def parametrized(module: nn.Module, name: str, change: nn.Module) -> Iterator[None]:
    """The parameter passes through `change` wherever it is read. Nested contexts on one parameter
    apply in the order of entering."""
    parametrize.register_parametrization(module, name, change)
    try:
        yield
    finally:
        parts = module.get_submodule(f"parametrizations.{name}")
        assert isinstance(parts, nn.ModuleList)
        if len(parts) > 1:
            del parts[-1]
        else:
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)


def channels_of(task: Task, index: int, sites: str, key: str = "transform.sites") -> list[Channels]:
    """Where block `index` can be scaled, in execution order; UserError, naming `key`, when nowhere.

    sites: `norms` (norm → linears); `norms+value` (also value → output projection); or
    `norms+value+up` (also up → down in a gated MLP, or fc1 → fc2 through ReLU).
    """
    arch = task.arch
    groups = _groups(arch, sites, key)
    if index == 0 and arch.post_norm:
        log.info("norms are not scaled: they stand behind the residual sums and make the stream")
    elif index == 0 and sites != "norms" and groups == _groups(arch, "norms", key):
        log.info("%s=%s: this family has no sites besides its norms", key, sites)
    return [_channels(task, index, group) for group in groups]


def _groups(arch: Arch, sites: str, key: str) -> list[Group]:
    if sites not in SITES:
        raise UserError(f"{key}={sites} is unknown: give one of {', '.join(SITES)}.")
    norms = [group for group in arch.groups if group.producer in arch.norms]
    found = [group for group in arch.groups if group.producer is not None]
    if arch.post_norm:
        found = [group for group in found if group not in norms]
        norms = []
    if sites != "norms+value+up":  # the last writer ends the MLP
        found = [group for group in found if group.linears[0] != arch.writers[-1]]
    found = norms if sites == "norms" else found
    if not found:
        more = "; sites=norms+value scales its values" if sites == "norms" else ""
        raise UserError(
            f"{key}={sites}: in this family norms stand behind the residual sums, so "
            f"what they make is the stream itself and its channels cannot be scaled{more}."
        )
    return found


def _channels(task: Task, index: int, group: Group) -> Channels:
    arch, block = task.arch, task.blocks[index]
    assert group.producer is not None
    producer = block.get_submodule(group.producer)
    linears = [m for m in map(block.get_submodule, group.linears) if isinstance(m, nn.Linear)]
    norm = group.producer in arch.norms
    heads = repeats = 1
    if isinstance(producer, nn.Linear) and producer.out_features != linears[0].in_features:
        heads = task.model.config.get_text_config().num_key_value_heads
        repeats = linears[0].in_features // producer.out_features
    return Channels(
        name=f"{arch.blocks}.{index}.{group.producer}",
        producer=producer,
        linears=tuple(linears),
        offset=1.0 if norm and arch.unit_offset else 0.0,
        heads=heads,
        repeats=repeats,
        # A gated MLP multiplies its up projection, and a shift does not pass a product.
        shiftable=getattr(producer, "bias", None) is not None
        and (norm or group.linears[0] == arch.writers[0]),
    )


def _give_bias(linear: nn.Linear) -> None:
    if linear.bias is None:
        zeros = torch.zeros_like(linear.weight[:, 0])
        linear.bias = nn.Parameter(zeros, requires_grad=linear.weight.requires_grad)


def _wide(x: Tensor) -> Tensor:
    """Without gradients, in float32 at least."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))
