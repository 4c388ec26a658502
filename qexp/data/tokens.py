"""Tokenization of texts, cached per text and tokenizer."""

import logging

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qexp.common.cache import Cache
from qexp.common.errors import UserError
from qexp.common.tokenizer_hash import fingerprint
from qexp.data.corpus import Corpus, digest
from qexp.task import Task

log = logging.getLogger(__name__)

# Where a text or its windows begin with BOS, see `window_bos`.
BOS = ("none", "start", "each", "auto")


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


def window_bos(kind: str, task: Task) -> int | None:
    """The BOS token that every window of a text begins with, in the place of its first token.

    kind, one of BOS: with `each` the one that the tokenizer itself puts before a text; with `auto`
    that one or, for a family that was trained behind it (`Arch.expects_bos`), the vocabulary's.
    None where there is none, for `none`, and for `start`: the tokenizer's special tokens, once
    before the whole text.
    """
    if kind not in ("each", "auto"):
        return None
    own = begins(task.tokenizer)
    if own is None and kind == "auto" and task.arch.expects_bos and task.tokenizer is not None:
        own = task.tokenizer.bos_token_id
    return own


def followed_bos(kind: str, task: Task) -> dict[str, bool]:
    """What `window_bos` decided, for a definition; empty where nothing was left to it."""
    return {"add_bos": window_bos(kind, task) is not None} if kind in ("each", "auto") else {}


def warn_without_bos(place: str, kind: str, task: Task) -> None:
    """Warn of windows without BOS if the model's family was trained behind it."""
    if kind == "none" and task.arch.expects_bos and window_bos("auto", task) is not None:
        log.warning(
            "%s: bos=none, but this model was trained with BOS before every text. Without it "
            "perplexities are far higher, and Hessians are those of another state; choose bos=auto",
            place,
        )


def with_bos(windows: Int64[Tensor, "*windows length"], bos: int | None) -> Tensor:
    """Windows whose first token is BOS; as they are for None."""
    if bos is None:
        return windows
    return torch.cat([torch.full_like(windows[..., :1], bos), windows[..., 1:]], -1)


def encode(
    tokenizer: PreTrainedTokenizerBase, text: str, special: bool = False
) -> Int64[Tensor, " tokens"]:
    """The ids of `text`, from the cache where it was tokenized before."""

    def build() -> dict[str, Tensor]:
        return {"ids": torch.tensor(encode_now(tokenizer, text, special), dtype=torch.int64)}

    key = {"text": digest([text]), "tokenizer": fingerprint(tokenizer), "special": special}
    return Cache().get("tokens", key, build)["ids"]


def running(
    task: Task,
    corpus: Corpus,
    split: str,
    join: str | None = None,
    documents: int | None = None,
    bos: str = "none",
    enough: int = 0,
) -> Int64[Tensor, " tokens"]:
    """A split as one sequence of ids, behind BOS unless `bos` is none.

    join: None takes the running text; a string joins the documents by it, or only the first
    `documents` of them. A model without a tokenizer gets `enough` ids of the synthetic corpus.
    """
    if task.tokenizer is None:
        return corpus.ids(split, task.model.config.vocab_size, enough)
    text = corpus.text(split) if join is None else join.join(corpus.documents(split)[:documents])
    ids = encode(task.tokenizer, text, special=bos == "start")
    first = window_bos(bos, task)
    return ids if first is None else torch.cat([ids.new_tensor([first]), ids])


def check_length(model: PreTrainedModel, length: int, key: str) -> None:
    """UserError if windows of `length` are longer than the model's context."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise UserError(f"{key}: {length} tokens, but this model has {limit} positions")
