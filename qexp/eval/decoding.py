"""Perplexity by decoding: the model reads its own cache of keys and values, as in generation."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import DynamicCache

from qexp.common.errors import UserError
from qexp.eval.perplexity import Perplexity
from qexp.eval.token_losses import token_losses
from qexp.eval.windowed import Passage, Windowed
from qexp.quantizers.attention import counting_outliers, window_of
from qexp.quantizers.cache_window import cache_bits
from qexp.task import CausalLM, Task


@dataclass(frozen=True, kw_only=True)
class DecodingPerplexity(Windowed):
    """Windows of `length` tokens over a whole text, of which the first `prompt` are read in one
    call and not scored. The others are given to the model `chunk` at a time, with a cache.

    `chunk` changes no number: a token of a chunk reads the cache as if it came alone. `join`,
    `bos`, `limit`: as for `Perplexity`, whose windows with `context=prompt` these are. The metric
    `cache_bits`, of quantized caches: per number of keys and values at the end of a text, scales
    included. It is not given for quantizers at the projections (`kv=llm_qat`).
    """

    length: int
    prompt: int
    chunk: int = 1
    limit: int | None = None
    join: str | None = None
    bos: str = "none"

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise UserError(f"eval {self.name}: chunk {self.chunk} must be at least 1")
        if not 1 <= self.prompt < self.length:
            raise UserError(
                f"eval {self.name}: prompt {self.prompt} must be between 1 and length - 1 "
                f"({self.length - 1})"
            )
        self._plain()

    def _plain(self) -> Perplexity:
        return Perplexity(
            name=self.name,
            corpus=self.corpus,
            split=self.split,
            length=self.length,
            context=self.prompt,
            limit=self.limit,
            join=self.join,
            bos=self.bos,
        )

    @property
    def decodes(self) -> bool:
        return True

    def passages(self, task: Task) -> list[Passage]:
        return self._plain().passages(task)

    def __call__(self, task: Task) -> dict[str, float]:
        window = window_of(task.model)
        if window is None:
            found, bits = Windowed.__call__(self, task), cache_bits(task)
            return found if bits is None else found | {"cache_bits": bits}
        with counting_outliers(task.model) as shares:
            found = Windowed.__call__(self, task)
        return found | {"cache_bits": window.stored_bits(self.length - 1, shares())}

    def definition(self) -> dict[str, Any]:
        return {key: x for key, x in Windowed.definition(self).items() if key != "chunk"}

    def followed(self, task: Task) -> dict[str, Any]:
        return self._plain().followed(task)

    def _losses(self, task: Task, passages: list[Passage]) -> list[Float[Tensor, " scored"]]:
        def decode(ids: Int64[Tensor, "windows tokens"]) -> Tensor:
            assert isinstance(task, CausalLM)
            return torch.cat(list(decoded(task, ids, self.prompt, self.chunk)), 1)

        every = [window for passage in passages for window in passage.windows]
        return token_losses(task, every, self.batch_tokens, self.name, decode)


def decoded(
    task: CausalLM, ids: Int64[Tensor, "windows tokens"], prompt: int, chunk: int
) -> Iterator[Float[Tensor, "windows some width"]]:
    """The final hidden states of the prompt, then of `chunk` tokens at a time."""
    cache = DynamicCache()
    for part in (ids[:, :prompt], *ids[:, prompt:].split(chunk, 1)):
        if part.shape[1]:
            inputs = part.to(task.device)
            yield task.model.base_model(input_ids=inputs, past_key_values=cache, use_cache=True)[0]
