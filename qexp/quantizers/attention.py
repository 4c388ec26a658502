"""Quantizers and online maps inside attention, through transformers' attention interface.

Two implementations are registered: `qexp_operands` computes attention step by step with a
quantizer on any operand and result; `qexp_cache` quantizes only keys and values and leaves the
rest to the fused kernel. Both map operands before they round them.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

OPERANDS = ("query", "key", "value", "scores", "probabilities")
CACHE = ("key", "value")


@dataclass(frozen=True)
class Inside:
    """The quantizers and online maps of one attention module, by operand; an operand without any is
    unchanged. Maps come first."""

    quantizers: dict[str, nn.Module]
    maps: dict[str, nn.Module] = field(default_factory=dict)

    def __call__(self, operand: str, x: Tensor) -> Tensor:
        for change in (self.maps.get(operand), self.quantizers.get(operand)):
            x = x if change is None else change(x)
        return x


_NONE = Inside({})


def install(model: nn.Module, inside: dict[nn.Module, Inside]) -> None:
    """Make the model's attention modules use these quantizers and maps, with those they have."""
    operands: set[str] = set()
    for module, more in inside.items():
        own = _of(module)
        merged = Inside(own.quantizers | more.quantizers, own.maps | more.maps)
        operands |= merged.quantizers.keys()
        # Set past nn.Module's bookkeeping: the quantizers belong to the task, not to this module.
        object.__setattr__(module, "_qexp_inside", merged)
    implementation = "qexp_cache" if operands <= set(CACHE) else "qexp_operands"
    model.set_attn_implementation(implementation)  # type: ignore[operator]


def _of(module: nn.Module) -> Inside:
    inside: Inside = getattr(module, "_qexp_inside", _NONE)
    return inside


def _cache(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    inside = _of(module)
    query, key, value = (
        inside(name, x) for name, x in zip(OPERANDS[:3], (query, key, value), strict=True)
    )
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


def _operands(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    inside = _of(module)
    query, key, value = (
        inside(name, x) for name, x in zip(OPERANDS[:3], (query, key, value), strict=True)
    )
    shared = query.shape[1] // key.shape[1]  # query heads that read one key head
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Before the mask, whose huge negative entries would swallow the range.
    scores = inside("scores", query @ key.transpose(-1, -2) * scaling)
    if mask is not None:
        scores = scores + mask
    probabilities = inside("probabilities", scores.softmax(-1, dtype=torch.float32).to(query.dtype))
    probabilities = nn.functional.dropout(probabilities, dropout, module.training)
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


AttentionInterface.register("qexp_cache", _cache)
AttentionMaskInterface.register("qexp_cache", sdpa_mask)
AttentionInterface.register("qexp_operands", _operands)
AttentionMaskInterface.register("qexp_operands", eager_mask)
