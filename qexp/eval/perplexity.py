"""Perplexity protocols: windows over a text, random crops, or documents scored per word.

The settings of each published protocol, with their sources, are in conf/eval/.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from qexp.common.errors import UserError
from qexp.data.sampling import random_documents
from qexp.data.tokens import (
    BOS,
    check_length,
    encode,
    followed_bos,
    running,
    warn_without_bos,
    window_bos,
    with_bos,
)
from qexp.eval.token_losses import Window
from qexp.eval.wikitext import detokenize, pages, words
from qexp.eval.windowed import Passage, Windowed
from qexp.task import Task


@dataclass(frozen=True, kw_only=True)
class Perplexity(Windowed):
    """Consecutive windows of `length` tokens over a whole text.

    `join`: null takes the text as it stands, else the first `documents` (null: all) joined by it.
    `context`: tokens at the start of a window that are seen but never scored, at least 1.
    `stride`: from one window's start to the next (null: `length`, no overlap); a token is scored
    once, in the first window that reaches it. `tail`: whether the last, shorter window counts.
    `limit`: windows to use (null: all). `bos`: `none`; `start` = what the tokenizer itself puts
    before a text, once; `each` = the text and every window begin with BOS where the tokenizer puts
    one before a text (in a window it takes the first token's place), and none does elsewhere;
    `auto` = as `each`, and also for a family that was trained behind BOS. BOS is never scored.
    """

    length: int
    limit: int | None = None
    join: str | None = None
    documents: int | None = None
    context: int = 1
    stride: int | None = None
    tail: bool = False
    bos: str = "none"

    def __post_init__(self) -> None:
        _check_bos(self.name, self.bos)
        if not 1 <= self.context < self.length:
            raise UserError(
                f"eval {self.name}: context {self.context} must be between 1 and length - 1 "
                f"({self.length - 1})"
            )
        if not 1 <= (self.stride or self.length) <= self.length:
            raise UserError(
                f"eval {self.name}: stride {self.stride} must be between 1 and length "
                f"({self.length})"
            )
        if self.limit is not None and self.limit < 1:
            raise UserError(f"eval {self.name}: limit {self.limit} must be at least 1")

    def passages(self, task: Task) -> list[Passage]:
        check_length(task.model, self.length, f"eval {self.name}: length")
        warn_without_bos(f"eval {self.name}", self.bos, task)
        ids, bos = self._ids(task), window_bos(self.bos, task)
        stride = self.stride or self.length
        windows: list[Window] = []
        scored_until = 0
        for start in range(0, len(ids), stride):
            end = min(start + self.length, len(ids))
            if end - start < self.length and not self.tail:
                break
            scored = min(end - start - self.context, end - scored_until)
            if scored > 0:
                windows.append(Window(with_bos(ids[start:end], bos), scored))
            scored_until = end
            if end == len(ids) or len(windows) == self.limit:
                break
        if not windows or len(ids) < self.length:
            raise self.too_short(len(ids), self.length)
        return [Passage([window], window.scored) for window in windows]

    def _ids(self, task: Task) -> Int64[Tensor, " tokens"]:
        return running(
            task,
            self.corpus,
            self.split,
            self.join,
            self.documents,
            self.bos,
            enough=(self.limit or 64) * self.length,
        )

    def followed(self, task: Task) -> dict[str, Any]:
        return followed_bos(self.bos, task)


@dataclass(frozen=True, kw_only=True)
class CropPerplexity(Windowed):
    """One random window in each of `count` random documents (GPTQ's first C4 protocol).

    Only documents of at least `length` tokens are used. Each document is tokenized separately;
    with `bos: start` the tokenizer adds its special tokens. The other choices are those of
    `Perplexity`.
    """

    length: int
    count: int = 256
    seed: int = 0
    bos: str = "start"

    def __post_init__(self) -> None:
        _check_bos(self.name, self.bos)

    def followed(self, task: Task) -> dict[str, Any]:
        return followed_bos(self.bos, task)

    def passages(self, task: Task) -> list[Passage]:
        check_length(task.model, self.length, f"eval {self.name}: length")
        if task.tokenizer is None:
            raise UserError(f"eval {self.name}: this model has no tokenizer; choose eval=held_out")
        warn_without_bos(f"eval {self.name}", self.bos, task)
        crops = random_documents(
            task.tokenizer,
            self.corpus.documents(self.split),
            self.length,
            self.count,
            self.seed,
            self.bos == "start",
        )
        crops = with_bos(crops, window_bos(self.bos, task))
        return [Passage([Window(crop, self.length - 1)], self.length - 1) for crop in crops]


@dataclass(frozen=True, kw_only=True)
class WordPerplexity(Windowed):
    """exp(loss per word) over the pages of WikiText, as in lm-eval's task `wikitext`.

    Each page is detokenized and scored after a prefix token (BOS, else EOS) in windows of `length`
    (null: the model's context length). The last window starts earlier, so that it has full length.
    Words are counted before detokenization. `limit`: number of pages (null: all).
    """

    length: int | None = None
    limit: int | None = None

    def passages(self, task: Task) -> list[Passage]:
        if task.tokenizer is None:
            raise UserError(f"eval {self.name}: this model has no tokenizer; choose eval=held_out")
        length = self.length or task.model.config.max_position_embeddings
        check_length(task.model, length, f"eval {self.name}: length")
        prefix = task.tokenizer.bos_token_id
        if prefix is None:
            prefix = task.tokenizer.eos_token_id
        if prefix is None:
            raise UserError(f"eval {self.name}: the tokenizer has neither a BOS nor an EOS token")
        passages = []
        for page in pages(self.corpus.text(self.split))[: self.limit]:
            ids = encode(task.tokenizer, detokenize(page), special=True)
            prefixed = torch.cat([ids.new_tensor([prefix]), ids])  # prefixed[i + 1] is ids[i]
            windows = []
            for start in range(0, len(ids), length):
                end = min(start + length, len(ids))
                tokens = prefixed[max(0, end - length) : end + 1]
                windows.append(Window(tokens, end - start))
            if windows:
                passages.append(Passage(windows, words(page)))
        if not passages:
            raise self.too_short(0, length)
        return passages


def _check_bos(name: str, bos: str) -> None:
    if bos not in BOS:
        raise UserError(f"eval {name}: bos {bos!r} is not one of {', '.join(BOS)}")
