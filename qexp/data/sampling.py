"""How windows of equal length are cut from texts: the samplings of the calibration recipes."""

import logging
import random
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qexp.common.cache import Cache
from qexp.common.errors import UserError
from qexp.common.progress import bar
from qexp.common.tokenizer_hash import fingerprint
from qexp.data.corpus import digest
from qexp.data.tokens import encode_now

log = logging.getLogger(__name__)

Windows = Int64[Tensor, "windows length"]


def consecutive(ids: Int64[Tensor, " tokens"], length: int, count: int) -> Windows:
    """The first `count` windows that do not overlap, or as many as there are; the tail is left."""
    found = min(count, len(ids) // length)
    return ids[: found * length].reshape(found, length)


def random_windows(
    ids: Int64[Tensor, " tokens"], length: int, count: int, seed: int
) -> Int64[Tensor, "windows length"]:
    """Windows anywhere in a text, drawn by Python's `random`, as GPTQ's wikitext2 recipe does.

    `randint(0, tokens - length - 1)` never reaches the last window; that is the reference's choice.
    """
    if len(ids) < length:
        return ids.new_empty(0, length)
    rng = random.Random(seed)
    starts = [rng.randint(0, max(0, len(ids) - length - 1)) for _ in range(count)]
    return torch.stack([ids[start : start + length] for start in starts])


def random_documents(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    length: int,
    count: int,
    seed: int,
    special: bool,
) -> Int64[Tensor, "windows length"]:
    """A random window in each of `count` random documents of at least `length` tokens (GPTQ's C4).

    Documents are drawn with replacement until one is long enough; one stream of Python's `random`
    draws documents and starts.
    """

    def build() -> dict[str, Tensor]:
        rng = random.Random(seed)
        known: dict[int, list[int]] = {}
        hopeless = {i for i, text in enumerate(documents) if _too_short(text, length)}
        windows = []
        for _ in bar(range(count), "drawing documents"):
            while True:
                if len(hopeless) == len(documents):
                    raise UserError(
                        f"no document has {length} tokens, so none can be drawn; "
                        "choose a smaller length or another corpus"
                    )
                drawn = rng.randint(0, len(documents) - 1)
                if drawn in hopeless:
                    continue
                if drawn not in known:
                    known[drawn] = encode_now(tokenizer, documents[drawn], special)
                if len(known[drawn]) >= length:
                    break
                hopeless.add(drawn)
            start = rng.randint(0, max(0, len(known[drawn]) - length - 1))
            windows.append(known[drawn][start : start + length])
        return {"windows": torch.tensor(windows, dtype=torch.int64)}

    key = {
        "sampling": "random_documents",
        "documents": digest(documents),
        "tokenizer": fingerprint(tokenizer),
        "special": special,
        "length": length,
        "count": count,
        "seed": seed,
    }
    return Cache().get("windows", key, build)["windows"]


def short_documents(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    length: int,
    count: int,
    seed: int,
    special: bool,
) -> Int64[Tensor, "windows length"]:
    """AWQ's recipe for the Pile: `count` documents of at most `length` tokens, strung together.

    Documents come in the order of numpy's `default_rng(seed).permutation`, which is the order that
    `datasets` shuffles to; windows are then cut from the string, so there are fewer than `count`.
    """
    ids: list[int] = []
    used = 0
    for drawn in np.random.default_rng(seed).permutation(len(documents)):
        tokens = encode_now(tokenizer, documents[drawn].strip(), special)
        if 0 < len(tokens) <= length:
            ids += tokens
            used += 1
        if used == count:
            break
    return consecutive(torch.tensor(ids, dtype=torch.int64), length, count)


def _too_short(text: str, length: int) -> bool:
    """Whether no tokenizer could reach `length`: a token covers a byte or more, but for a few
    special ones. Spares tokenising most of C4; draws the same documents."""
    return len(text) * 4 + 8 < length or len(text.encode("utf-8", "replace")) + 8 < length
