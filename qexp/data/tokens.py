"""Tokenization of texts, cached per text and tokenizer."""

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qexp.common.cache import Cache
from qexp.common.errors import UserError
from qexp.common.tokenizer_hash import fingerprint
from qexp.data.corpus import Corpus, digest


def encode_now(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    """The ids of `text`; `special` adds the special tokens of the tokenizer (BOS)."""
    # verbose=False: a text longer than the model's context is intended here
    return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]


def begins(tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """The BOS token that the tokenizer itself puts before a text, the vocabulary's `add_bos`; None
    where it puts none there, or has none."""
    if tokenizer is None or tokenizer.bos_token_id is None:
        return None
    bos = int(tokenizer.bos_token_id)
    return bos if encode_now(tokenizer, "", special=True)[:1] == [bos] else None


def encode(
    tokenizer: PreTrainedTokenizerBase, text: str, special: bool = False
) -> Int64[Tensor, " tokens"]:
    """The ids of `text`, from the cache where it was tokenized before."""

    def build() -> dict[str, Tensor]:
        return {"ids": torch.tensor(encode_now(tokenizer, text, special), dtype=torch.int64)}

    key = {"text": digest([text]), "tokenizer": fingerprint(tokenizer), "special": special}
    return Cache().get("tokens", key, build)["ids"]


def running(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    corpus: Corpus,
    split: str,
    join: str | None = None,
    documents: int | None = None,
    special: bool = False,
    enough: int = 0,
) -> Int64[Tensor, " tokens"]:
    """A split as one sequence of ids.

    join: None takes the running text; a string joins the documents by it, or only the first
    `documents` of them. A model without a tokenizer gets `enough` ids of the synthetic corpus.
    """
    if tokenizer is None:
        return corpus.ids(split, model.config.vocab_size, enough)
    if join is None:
        return encode(tokenizer, corpus.text(split), special)
    return encode(tokenizer, join.join(corpus.documents(split)[:documents]), special)


def check_length(model: PreTrainedModel, length: int, key: str) -> None:
    """UserError if windows of `length` are longer than the model's context."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise UserError(f"{key}: {length} tokens, but this model has {limit} positions")
