"""Per-channel scales and shifts of activations, folded into a producer and its linears.

With y an activation, s a scale and z a shift per channel: the producer outputs (y - z) / s, and the
linears that read it have W diag(s) and b + W z. The model computes the same function."""

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
from qexp.common.on_disk import assign
from qexp.quantizers.maps import refuse_mapped
from qexp.task import Task

log = logging.getLogger(__name__)

# The current value of a scale or a shift.
Follow = Callable[[], Float[Tensor, " channels"]]

SITES = ("norms", "norms+value", "norms+value+up")


@dataclass(frozen=True)
class Channels:
    """The channels that the linears of a group read, and the norm or linear that produces them.

    name: the producer's. offset: 1 for norms that store their weight minus 1. heads, repeats: value
    heads, and query heads per value head (grouped-query attention); a row of the value projection
    belongs to `repeats` columns of the output projection. shiftable: the producer has a bias, and
    only attention (whose weights sum to 1) may lie between.
    """

    name: str
    producer: nn.Module
    linears: tuple[nn.Linear, ...]
    offset: float = 0.0
    heads: int = 1
    repeats: int = 1
    shiftable: bool = False

    def spread(self, x: Float[Tensor, " channels"]) -> Float[Tensor, " columns"]:
        """Expands channels of the producer to columns of the linears."""
        return x.reshape(self.heads, 1, -1).expand(-1, self.repeats, -1).flatten()

    def gather(self, x: Float[Tensor, " columns"]) -> Float[Tensor, " channels"]:
        """Reduces columns to channels by the maximum."""
        return x.reshape(self.heads, self.repeats, -1).amax(1).flatten()

    def weights(self) -> Float[Tensor, " channels"]:
        """The largest magnitude of the weights that read each channel."""
        columns = torch.stack([linear.weight.detach().abs().amax(0) for linear in self.linears])
        return self.gather(columns.amax(0)).float()

    @torch.no_grad()
    def fold(
        self, scale: Float[Tensor, " channels"], shift: Float[Tensor, " channels"] | None = None
    ) -> None:
        """Changes producer and linears permanently. A shift adds a bias to linears without one."""
        if not (scale.isfinite().all() and (scale > 0).all()):
            raise RuntimeError(f"{self.name}: a channel scale is not a positive, finite number")
        self.shift_into(shift)
        for name, parameter in self.producer.named_parameters(recurse=False):
            assign(parameter, self._scaled(name, _wide(parameter), scale, shift))
        self.multiply(scale)

    def shift_into(self, shift: Float[Tensor, " channels"] | None) -> None:
        """Applies a shift to the linears: b + W z."""
        if shift is None:
            return
        for linear in self.linears:
            weight = _wide(linear.weight)
            added = weight @ self.spread(shift).to(weight)
            _give_bias(linear)
            linear.bias.data = (_wide(linear.bias) + added).to(linear.bias)

    def multiply(self, scale: Float[Tensor, " channels"]) -> None:
        """Applies a scale to the linears: W diag(s)."""
        for linear in self.linears:
            assign(linear.weight, self._multiplied(_wide(linear.weight), scale))

    @contextmanager
    def live(self, scale: Follow, shift: Follow | None = None) -> Iterator[None]:
        """Applies the current `scale` and `shift` in every forward pass, with gradients.

        At the end of the context, producer and linears have their original parameters.
        """
        with ExitStack() as stack:
            for module, name, change in self._followers(scale, shift):
                stack.enter_context(parametrized(module, name, change))
            yield

    def install(self, scale: Follow) -> None:
        """Applies the current `scale` in every forward pass until `bake`."""
        for module, name, change in self._followers(scale, None):
            parametrize.register_parametrization(module, name, change)

    def bake(self) -> None:
        """Makes the current values permanent. Parameters without parametrization are skipped."""
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
                yield linear, "bias", _Shifted(self, _wide(linear.weight), shift)
            yield linear, "weight", _Multiplied(self, scale)
        # By name: a parameter that is already parametrized is not among named_parameters.
        for name in ("weight", "bias"):
            if getattr(self.producer, name, None) is not None:
                yield self.producer, name, _Scaled(self, name, scale, shift)

    def _scaled(self, name: str, value: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
        # At least float32, as in `fold`, so that both give the same result in half precision.
        wide = torch.promote_types(value.dtype, torch.float32)
        x, scale = value.to(wide), scale.to(wide)
        if name == "bias":
            scaled = (x if shift is None else x - shift.to(wide)) / scale
        elif x.ndim == 2:
            scaled = x / scale[:, None]
        else:
            scaled = (x + self.offset) / scale - self.offset
        return scaled.to(value)

    def _multiplied(self, weight: Tensor, scale: Tensor) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        return (weight.to(wide) * self.spread(scale).to(wide)).to(weight)


class _Scaled(nn.Module):
    def __init__(self, channels: Channels, name: str, scale: Follow, shift: Follow | None) -> None:
        super().__init__()
        self.channels, self.name, self.scale, self.shift = channels, name, scale, shift

    def forward(self, value: Tensor) -> Tensor:
        shift = None if self.shift is None else self.shift()
        return self.channels._scaled(self.name, value, self.scale(), shift)


class _Shifted(nn.Module):
    def __init__(self, channels: Channels, weight: Tensor, shift: Follow) -> None:
        super().__init__()
        self.channels, self.weight, self.shift = channels, weight, shift

    def forward(self, bias: Tensor) -> Tensor:
        return bias + (self.weight @ self.channels.spread(self.shift()).to(self.weight)).to(bias)


class _Multiplied(nn.Module):
    def __init__(self, channels: Channels, scale: Follow) -> None:
        super().__init__()
        self.channels, self.scale = channels, scale

    def forward(self, weight: Tensor) -> Tensor:
        return self.channels._multiplied(weight, self.scale())


@contextmanager
def parametrized(module: nn.Module, name: str, change: nn.Module) -> Iterator[None]:
    """Replaces a parameter by `change` of it; nested contexts apply in the order of entering."""
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
    """The channels of block `index` that can be scaled, in execution order.

    sites: `norms` (norm → linears); `norms+value` (also value → output projection); or
    `norms+value+up` (also up → down in a gated MLP, or fc1 → fc2 through ReLU).
    """
    arch = task.arch
    groups = _groups(arch, sites, key)
    if index == 0 and arch.post_norm:
        log.info("norms are not scaled: in a post-norm model their output is the residual stream")
    elif index == 0 and sites != "norms" and groups == _groups(arch, "norms", key):
        log.info("%s=%s: this model family has no sites other than its norms", key, sites)
    return [_channels(task, index, group) for group in groups]


def _groups(arch: Arch, sites: str, key: str) -> list[Group]:
    if sites not in SITES:
        raise UserError(f"{key}={sites} is unknown: give one of {', '.join(SITES)}.")
    norms = [group for group in arch.groups if group.producer in arch.norms]
    groups = [group for group in arch.groups if group.producer is not None]
    if arch.post_norm:
        groups = [group for group in groups if group not in norms]
        norms = []
    if sites != "norms+value+up":  # the last writer ends the MLP
        groups = [group for group in groups if group.linears[0] != arch.writers[-1]]
    groups = norms if sites == "norms" else groups
    if not groups:
        advice = "; sites=norms+value scales its values" if sites == "norms" else ""
        raise UserError(
            f"{key}={sites}: this model family is post-norm: its norms output the residual "
            f"stream, whose channels cannot be scaled{advice}."
        )
    return groups


def _channels(task: Task, index: int, group: Group) -> Channels:
    arch, block = task.arch, task.blocks[index]
    refuse_mapped(task, index, group)
    producer = block.get_submodule(str(group.producer))
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
        # Not the up projection of a gated MLP: a shift cannot be moved through a product.
        shiftable=getattr(producer, "bias", None) is not None
        and (norm or group.linears[0] == arch.writers[0]),
    )


def _give_bias(linear: nn.Linear) -> None:
    if linear.bias is None:
        zeros = torch.zeros_like(linear.weight[:, 0])
        linear.bias = nn.Parameter(zeros, requires_grad=linear.weight.requires_grad)


def _wide(x: Tensor) -> Tensor:
    """Detached, at least float32."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))
