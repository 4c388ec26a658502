"""Cached keys and values in two versions, float and rounded, and which of them a query reads."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Cache = Float[Tensor, "batch heads tokens channels"]
ALL = 2**62  # more tokens than there are
Rounded = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Axis:
    """How the tensor of one cache is cut into vectors with scales of their own.

    name: `token`, the channels of a token's head (of all its heads, unless `per_head`); `channel`,
    the tokens of a channel, in groups of `group` tokens. group: None with scales that are known
    beforehand, which need no second token.
    """

    name: str
    group: int | None = None
    per_head: bool = True

    def round(self, x: Cache, quantizer: Rounded) -> Cache:
        """The tokens of a last, incomplete group stay as they are."""
        if self.name == "token":
            if self.per_head:
                return quantizer(x)
            tokens = x.transpose(1, 2)
            return quantizer(tokens.flatten(2)).reshape(tokens.shape).transpose(1, 2)
        if self.group is None:
            channels = x.permute(1, 3, 0, 2)
            rows = quantizer(channels.flatten(0, 1).flatten(1))
            return rows.reshape(channels.shape).permute(2, 0, 3, 1)
        whole = x.shape[2] // self.group * self.group
        if not whole:
            return x
        made = quantizer(x[:, :, :whole].transpose(2, 3).contiguous()).transpose(2, 3)
        return torch.cat([made, x[:, :, whole:]], 2)


class Versions(NamedTuple):
    """Keys or values: query i reads `rounded` of token j where is_old[i, j], else `plain`."""

    plain: Cache
    rounded: Cache
    is_old: Bool[Tensor, "queries tokens"]

    @property
    def single(self) -> Cache | None:
        """The version that all queries read of every token, if it is one."""
        if bool(self.is_old.all()):
            return self.rounded
        return None if bool(self.is_old.any()) else self.plain

    def map(self, change: Callable[[Tensor], Tensor]) -> "Versions":
        return Versions(change(self.plain), change(self.rounded), self.is_old)


@dataclass(frozen=True)
class Window:
    """Which tokens of a cache are rounded when a query reads it (KIVI, 2402.02750).

    keys, values: their axes. length: newest tokens that are float. A token on the axis `token` is
    rounded when it is older than that; on the axis `channel`, tokens are rounded in blocks of
    `length` (of a group, where there is no window) and read rounded after the block's last token.
    Without a window a token's own vector is rounded too, unless it waits for its group. sinks:
    first tokens that stay float. prefill: queries of the call that starts the cache read float
    keys and values, as a prompt does in deployment. doubled: keys arrive in both versions, those
    that were rounded before the rotary embedding in the first half of the heads. costs: bits of a
    rounded number of keys and of values, its share of scales included.
    """

    keys: Axis
    values: Axis
    length: int = 0
    sinks: int = 0
    prefill: bool = False
    doubled: bool = False
    costs: tuple[float, float] = (16.0, 16.0)

    def versions(self, operand: str, x: Cache, queries: int, quantizer: Rounded) -> Versions:
        """The cache of an operand (`key` or `value`), for the last `queries` of its tokens."""
        is_old = self.is_old(operand, queries, x.shape[2]).to(x.device)
        if operand == "key" and self.doubled:
            rounded, plain = x.chunk(2, 1)
            return Versions(plain, rounded, is_old)
        return Versions(x, self._axis(operand).round(x, quantizer), is_old)

    def is_old(self, operand: str, queries: int, tokens: int) -> Bool[Tensor, "queries tokens"]:
        """Whether each of the last `queries` tokens reads each token of the cache rounded."""
        if self.prefill and queries == tokens:
            return torch.zeros(queries, tokens, dtype=torch.bool)
        at = torch.arange(tokens - queries, tokens)[:, None]
        token = torch.arange(tokens)[None]
        return (token < self._rounded_until(operand, at)) & (token >= self.sinks)

    def stored_bits(self, tokens: int, kept: tuple[float, float] = (0.0, 0.0)) -> float:
        """Bits per number of keys and values after `tokens` tokens; a float one has 16.

        kept: shares of rounded keys and values that are outliers; each takes a value and an index
        of 16 bits more.
        """
        total = 0.0
        for operand, cost, share in zip(("key", "value"), self.costs, kept, strict=True):
            until = int(self._rounded_until(operand, torch.tensor(tokens)))
            rounded = max(min(until, tokens) - self.sinks, 0)
            total += rounded * (cost + 32 * share) + (tokens - rounded) * 16
        return total / (2 * tokens)

    def _axis(self, operand: str) -> Axis:
        return self.keys if operand == "key" else self.values

    def _rounded_until(self, operand: str, query: Tensor) -> Tensor:
        """The first token that is float for a query at each position."""
        axis = self._axis(operand)
        if axis.name == "channel" and axis.group is not None:
            block = self.length or axis.group
            return query // block * block
        # Without a window all tokens: those after the query are masked.
        return query - self.length if self.length else torch.full_like(query, ALL)
