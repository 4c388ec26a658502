"""Quantizers and online maps inside attention, through transformers' attention interface.

Two implementations are registered: `qexp_operands` computes attention step by step with a
quantizer on any operand and result; `qexp_cache` quantizes only keys and values and leaves the
rest to the fused kernel, unless a window makes some queries read them float and others rounded.
Both map operands before they round them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from qexp.quantizers.activation import FakeQuant
from qexp.quantizers.window import Versions, Window

OPERANDS = ("query", "key", "value", "scores", "probabilities")
CACHE = ("key", "value")


@dataclass(frozen=True)
class Inside:
    """The quantizers and online maps of one attention module, by operand; an operand without any is
    unchanged. Maps come first.

    window: which tokens of keys and values are rounded; None: all.
    """

    quantizers: dict[str, nn.Module]
    maps: dict[str, nn.Module] = field(default_factory=dict)
    window: Window | None = None

    def __call__(self, operand: str, x: Tensor) -> Tensor:
        quantizer = self.quantizers.get(operand)
        x = self._mapped(operand, x)
        return x if quantizer is None else quantizer(x)

    def cached(self, operand: str, x: Tensor, queries: int) -> Tensor | Versions:
        """Keys or values as the last `queries` tokens read them, one tensor if all read one."""
        if self.window is None:
            return self(operand, x)
        x = self._mapped(operand, x)
        made = self.window.versions(operand, x, queries, self.quantizers[operand])
        return made if made.single is None else made.single

    def _mapped(self, operand: str, x: Tensor) -> Tensor:
        change = self.maps.get(operand)
        return x if change is None else change(x)


_NONE = Inside({})


def install(model: nn.Module, inside: dict[nn.Module, Inside]) -> None:
    """Make the model's attention modules use these quantizers and maps, with those they have."""
    operands: set[str] = set()
    for module, more in inside.items():
        own = _of(module)
        quantizers, maps = own.quantizers | more.quantizers, own.maps | more.maps
        merged = Inside(quantizers, maps, more.window or own.window)
        operands |= merged.quantizers.keys()
        # Set past nn.Module's bookkeeping: the quantizers belong to the task, not to this module.
        object.__setattr__(module, "_qexp_inside", merged)
    implementation = "qexp_cache" if operands <= set(CACHE) else "qexp_operands"
    model.set_attn_implementation(implementation)  # type: ignore[operator]


@contextmanager
def inserted(model: nn.Module, inside: dict[nn.Module, Inside]) -> Iterator[None]:
    """`install` for the context."""
    before = {module: _of(module) for module in inside}
    install(model, inside)
    try:
        yield
    finally:
        for module, own in before.items():
            object.__setattr__(module, "_qexp_inside", own)


@contextmanager
def as_decoded(model: nn.Module) -> Iterator[None]:
    """Within the context every position of a pass reads the cache as a step of decoding does."""
    found = {module: _of(module).window for module in model.modules()}
    windows = {module: replace(w, prefill=False) for module, w in found.items() if w is not None}
    with inserted(model, {module: Inside({}, window=w) for module, w in windows.items()}):
        yield


def window_of(model: nn.Module) -> Window | None:
    """The window of the model's quantized cache; None where there is none."""
    found = (_of(module).window for module in model.modules())
    return next((window for window in found if window is not None), None)


def cache_quantizers(model: nn.Module) -> list[FakeQuant]:
    """Those of keys and values, as the model's attention modules hold them; without a window."""
    found = [_of(module) for module in model.modules()]
    every = [own.quantizers.get(name) for own in found if own.window is None for name in CACHE]
    return [q for q in every if isinstance(q, FakeQuant)]


@contextmanager
def counting_outliers(model: nn.Module) -> Iterator[Callable[[], tuple[float, float]]]:
    """Within the context the quantizers of the cache count the values that stay as they are; what
    it yields returns their shares of keys and of values."""
    found = {module: _of(module) for module in model.modules()}
    pairs = [own.quantizers for own in found.values() if own.window is not None]
    lists: dict[str, list[tuple[int, int]]] = {name: [] for name in CACHE}
    for quantizers in pairs:
        for name, counts in lists.items():
            quantizers[name].kept = counts  # type: ignore[assignment]

    def shares() -> tuple[float, float]:
        keys, values = (
            sum(kept for kept, _ in counts) / max(sum(size for _, size in counts), 1)
            for counts in lists.values()
        )
        return keys, values

    try:
        yield shares
    finally:
        for quantizers in pairs:
            for name in CACHE:
                quantizers[name].kept = None  # type: ignore[assignment]


def reads_float(model: nn.Module) -> bool:
    """Whether a single pass over a text, as over a prompt, reads keys and values float although the
    cache of the model is quantized."""
    window = window_of(model)
    return window is not None and window.prefill


def _of(module: nn.Module) -> Inside:
    inside: Inside = getattr(module, "_qexp_inside", _NONE)
    return inside


def _cache(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    queries, inside = query.shape[2], _of(module)
    query = inside("query", query)
    keys, values = inside.cached("key", key, queries), inside.cached("value", value, queries)
    if isinstance(keys, Tensor) and isinstance(values, Tensor):
        return sdpa_attention_forward(module, query, keys, values, mask, **kwargs)
    mask = _additive(mask, query, queries, value.shape[2])
    return _attend(module, inside, query, keys, values, mask, **kwargs)


def _operands(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    queries, inside = query.shape[2], _of(module)
    query = inside("query", query)
    keys, values = inside.cached("key", key, queries), inside.cached("value", value, queries)
    return _attend(module, inside, query, keys, values, mask, **kwargs)


def _attend(
    module: nn.Module,
    inside: Inside,
    query: Tensor,
    keys: Tensor | Versions,
    values: Tensor | Versions,
    mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention step by step; masks are added to scores."""

    def shared(x: Tensor) -> Tensor:  # a key head for each query head that reads it
        return x.repeat_interleave(query.shape[1] // x.shape[1], 1)

    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(keys, Tensor):
        scores = query @ shared(keys).transpose(-1, -2)
    else:
        plain, rounded = (query @ shared(x).transpose(-1, -2) for x in keys[:2])
        scores = torch.where(keys.is_old, rounded, plain)
    # Before the mask, whose huge negative entries would swallow the range.
    scores = inside("scores", scores * scaling)
    if mask is not None:
        scores = scores + mask
    probabilities = inside("probabilities", scores.softmax(-1, dtype=torch.float32).to(query.dtype))
    probabilities = nn.functional.dropout(probabilities, dropout, module.training)
    if isinstance(values, Tensor):
        output = probabilities @ shared(values)
    else:
        old = probabilities.masked_fill(~values.is_old, 0)
        output = old @ shared(values.rounded) + (probabilities - old) @ shared(values.plain)
    return output.transpose(1, 2).contiguous(), probabilities


def _additive(mask: Tensor | None, query: Tensor, queries: int, tokens: int) -> Tensor:
    """The mask of a fused kernel (None: causal; booleans: what is read) as an added one."""
    if mask is None:
        mask = query.new_ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)
    if mask.dtype != torch.bool:
        return mask
    least = torch.finfo(query.dtype).min
    return query.new_zeros(mask.shape).masked_fill(~mask, least)


AttentionInterface.register("qexp_cache", _cache)
AttentionMaskInterface.register("qexp_cache", sdpa_mask)
AttentionInterface.register("qexp_operands", _operands)
AttentionMaskInterface.register("qexp_operands", eager_mask)
