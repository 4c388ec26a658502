"""Sampling of fixed-length windows from text, for calibration and training."""

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
    """The first `count` windows without overlap, or fewer where the text is short."""
    available = min(count, len(ids) // length)
    return ids[: available * length].reshape(available, length)


def random_windows(
    ids: Int64[Tensor, " tokens"], length: int, count: int, seed: int
) -> Int64[Tensor, "windows length"]:
    """Windows at random positions, drawn with Python's `random` (GPTQ's WikiText-2 recipe).

    `randint(0, tokens - length - 1)` never draws the last window, as in the reference.
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

    Documents are drawn with replacement until one is long enough. One generator of Python's
    `random` draws documents and positions. UserError where no document is long enough.
    """

    def build() -> dict[str, Tensor]:
        rng = random.Random(seed)
        encoded: dict[int, list[int]] = {}
        too_short = {i for i, text in enumerate(documents) if _too_short(text, length)}
        windows = []
        for _ in bar(range(count), "drawing documents"):
            while True:
                if len(too_short) == len(documents):
                    raise UserError(
                        f"calibration.length: no document has {length} tokens; "
                        "choose a smaller length or another corpus"
                    )
                drawn = rng.randint(0, len(documents) - 1)
                if drawn in too_short:
                    continue
                if drawn not in encoded:
                    encoded[drawn] = encode_now(tokenizer, documents[drawn], special)
                if len(encoded[drawn]) >= length:
                    break
                too_short.add(drawn)
            start = rng.randint(0, max(0, len(encoded[drawn]) - length - 1))
            windows.append(encoded[drawn][start : start + length])
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
    """AWQ's recipe for the Pile: `count` documents of at most `length` tokens, concatenated.

    Documents are in the order of numpy's `default_rng(seed).permutation`, as `datasets` shuffles
    them. The concatenation is divided into windows, so there are fewer than `count`.
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
    """Whether a text has fewer than `length` tokens with any tokenizer: apart from a few special
    ones, a token covers at least one byte. Avoids tokenizing most of C4; the draw is the same."""
    return len(text) * 4 + 8 < length or len(text.encode("utf-8", "replace")) + 8 < length
