"""Quantized key-value caches whose newest and first tokens stay float (KIVI, KVQuant)."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qexp.common.errors import FieldError, UserError, check_choice, check_int, check_range
from qexp.grid import Grid
from qexp.grid.clipping import Rounding
from qexp.grid.ranges import MinMax, OfStream
from qexp.grid.scale import cut
from qexp.grid.trimmed import Trimmed
from qexp.quantizers.activation import FakeQuant, beyond
from qexp.quantizers.attention import CACHE, cache_quantizers
from qexp.quantizers.operands import inside, operand_names
from qexp.quantizers.scheme import Activations
from qexp.quantizers.window import Axis, Window
from qexp.task import Task

AXES = ("token", "channel")
PROTOCOLS = ("teacher_forced", "prefill")


@dataclass(frozen=True)
class CacheWindow(Activations):
    """Keys and values as a cache holds them that rounds old tokens.

    grid: of both. Its groups are of adjacent channels of a token on the axis `token`, of adjacent
    tokens of a channel on the axis `channel`. keys, values: axes. window: newest tokens that are
    float; `Window` says which those are. sinks: first tokens that stay float. static_keys: scales
    of key channels are fitted to calibration data, and have no groups. before_rotary: keys are
    rounded as their projection returns them. per_head: tokens have scales per head; otherwise for
    all heads together. outliers: share of the outermost values of each vector that stay as they
    are, and that its range leaves out (KVQuant's dense-and-sparse form). protocol:
    `teacher_forced`, every position is a step of decoding, or `prefill`, the call that starts a
    cache reads it float, as prompts do in deployment.
    """

    grid: Grid
    keys: str = "channel"
    values: str = "token"
    window: int = 0
    sinks: int = 0
    static_keys: bool = False
    before_rotary: bool = False
    per_head: bool = True
    outliers: float | int = 0
    protocol: str = "teacher_forced"

    def __post_init__(self) -> None:
        check_choice(None, self, keys=AXES, values=AXES, protocol=PROTOCOLS)
        check_int(None, self, window=0, sinks=0)
        if self.grid.per_tensor:
            raise FieldError("grid.per_tensor=true: vectors of a cache have scales; give false.")
        if self.static_keys and self.keys != "channel":
            raise FieldError("static_keys=true with keys=token: give keys=channel, or false.")
        if self.static_keys and isinstance(self.grid.range, OfStream):
            raise FieldError("static_keys=true: channels have ranges; give range=minmax.")
        check_range(None, self, "a number from 0 to below 1", lambda x: 0 <= x < 1, "outliers")
        if self.outliers and self.grid.range != MinMax():
            raise FieldError(
                f"outliers={self.outliers}: the range is that of what is left; give range=minmax, "
                "or outliers=0."
            )
        if self.static_keys and self.grid.group_size is not None:
            raise FieldError(
                f"static_keys=true with grid.group_size={self.grid.group_size}: a channel has one "
                "scale; give null."
            )
        if self.before_rotary and self.keys == "channel" and not self.static_keys:
            raise FieldError(
                "before_rotary=true with keys=channel: a group of tokens is rounded after the "
                "embedding, when it is complete; give static_keys=true, or before_rotary=false."
            )
        size = self.grid.group_size
        if size is None and any(axis.group == 0 for axis in self._axes):
            raise FieldError("grid.group_size=null: groups of a channel are tokens; give a number.")
        if size is not None and self.window % size and any(axis.group for axis in self._axes):
            raise FieldError(
                f"window={self.window}: channels are rounded in groups of {size} tokens; give a "
                "multiple of grid.group_size."
            )

    @property
    def _axes(self) -> tuple[Axis, Axis]:
        size = self.grid.group_size or 0
        keys, values = (
            Axis(name, size if name == "channel" else None, self.per_head)
            for name in (self.keys, self.values)
        )
        return (replace(keys, group=None) if self.static_keys else keys), values

    def sites(self, task: Task) -> list[str]:
        return operand_names(task, CACHE)

    def put(self, task: Task) -> dict[str, FakeQuant]:
        if task.objective != "causal_lm":
            raise UserError(
                f"kv: a window is of text that is read in order, and this model is "
                f"{task.objective}; give kv=none."
            )
        doubled = self.before_rotary and _has_rotary(task)
        window = Window(
            *self._axes,
            self.window,
            self.sinks,
            self.protocol == "prefill",
            doubled,
            self._costs(task),
        )

        def make(operand: str) -> nn.Module:
            static = self.static_keys and operand == "key"
            return FakeQuant(
                self._trimmed,
                not static,
                per_row=static,
                keep_clipped=self.outliers > 0,
                caller=repr(window),
            )

        projections = _key_projections(task) if doubled else []
        made = inside(task, make, CACHE, window)
        quantizers = {name: q for name, q in made.items() if isinstance(q, FakeQuant)}
        for name, linear in zip(operand_names(task, ("key",)), projections, strict=False):
            _double(linear, window.keys, quantizers[name], _key_heads(task))
        return quantizers

    def _costs(self, task: Task) -> tuple[float, float]:
        """Bits of a rounded number of keys and of values; scales of static keys are no part of a
        cache."""
        vector = _head_width(task) * (1 if self.per_head else _key_heads(task))
        if "token" in (self.keys, self.values):
            cut(vector, self.grid.group_size, "kv.grid.group_size", "channels")
        bits = self.grid.cost(1, self.grid.group_size or vector)
        return (float(self.grid.bits) if self.static_keys else bits), bits

    @property
    def _trimmed(self) -> Grid:
        return replace(self.grid, range=Trimmed(self.outliers)) if self.outliers else self.grid  # type: ignore[type-var]

    def rounded(self, x: Tensor, rounding: Rounding = torch.round) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).float()
        q = self._trimmed.scales_of(rows).map(lambda part: part.reshape(-1, 1))
        groups = rows.reshape(len(q.scale), -1)
        made = self._trimmed.round(groups, q, rounding)
        if self.outliers and q.fitted is not None:
            made = torch.where(beyond(groups, *q.fitted), groups, made)
        return made.reshape(x.shape).to(x.dtype)


def _double(linear: nn.Linear, axis: Axis, quantizer: FakeQuant, heads: int) -> None:
    """Let the projection return twice as many heads: those of rounded keys, then those of keys."""

    def hook(_: nn.Module, __: Any, keys: Tensor) -> Tensor:
        cache = keys.unflatten(-1, (heads, -1)).transpose(1, 2)
        rounded = axis.round(cache, quantizer).transpose(1, 2).flatten(2)
        return torch.cat([rounded, keys], -1)

    linear.register_forward_hook(hook)


def _key_projections(task: Task) -> list[nn.Linear]:
    """UserError for families that make keys together with queries."""
    names = task.arch.groups[0].linears  # the first group is the attention's
    if len(names) != 3:
        raise UserError(
            f"kv.before_rotary=true: {names[0]} makes keys together with queries; give false."
        )
    found = [block.get_submodule(names[1]) for block in task.blocks]
    return [linear for linear in found if isinstance(linear, nn.Linear)]


def _has_rotary(task: Task) -> bool:
    config = task.model.config.get_text_config()
    return getattr(config, "rope_parameters", None) is not None


def cache_bits(task: Task) -> float | None:
    """Bits per number of keys and values of a cache that rounds every token's as they come, a
    head's vector alone; None of one that does not. Static scales are no part of a cache."""
    found = cache_quantizers(task.model)
    if not found:
        return None
    width = _head_width(task)
    bits = [q.grid.cost(1, width) if q.dynamic else q.grid.code_bits for q in found]
    return sum(bits) / len(bits)


def _head_width(task: Task) -> int:
    config = task.model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(width)


def _key_heads(task: Task) -> int:
    config = task.model.config.get_text_config()
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads
