"""Tokenizers in GGUF files: copied from the file that a model came from, byte-level BPE, or BPE of
SentencePiece."""

import json
import logging
import re
from pathlib import Path
from typing import Any

from gguf import GGUFReader, GGUFWriter
from transformers import PreTrainedTokenizerBase

from qexp.common.errors import UserError
from qexp.data.tokens import begins

log = logging.getLogger(__name__)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BYTES, PIECES = "gpt2", "llama"  # GGUF's names of the two kinds
PREFIX = "tokenizer."
NFC = {"type": "NFC"}
SPACE = "▁"
COLLAPSED = (r"\A +| +\z", " {2,}")  # of Llama2C's tokenizer
ROLES = {"unk": "unknown", "pad": "padding"}  # where GGUF's word is another
# Names that llama.cpp gives to pre-tokenizers, by the regular expressions that cut a text first.
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3, QWEN2 = (f"{CONTRACTIONS}{number}{REST}" for number in (r"\p{N}{1,3}", r"\p{N}"))


def copy(writer: GGUFWriter, origin: Path) -> None:
    """Every key of the tokenizer in another GGUF file."""
    for key, field in GGUFReader(origin).fields.items():
        if key.startswith(PREFIX):
            kind, *inner = field.types
            writer.add_key_value(key, field.contents(), kind, inner[0] if inner else None)


def write(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """The keys of a tokenizer; rows: of the embedding, unused ones included.

    Raises UserError for tokenizers of another kind.
    """
    own = settings(tokenizer)
    added = tokenizer.added_tokens_decoder
    words, kinds = [], []
    for index in range(rows):
        word = tokenizer.convert_ids_to_tokens(index) if index < len(tokenizer) else None
        words.append(f"[PAD{index}]" if word is None else word)
        if word is None:
            kinds.append(UNUSED)
        elif own["model"] == PIECES and index == tokenizer.unk_token_id:
            kinds.append(UNKNOWN)
        elif index in added:
            kinds.append(CONTROL if added[index].special else USER_DEFINED)
        elif own["model"] == PIECES and re.fullmatch("<0x[0-9A-F]{2}>", word):
            kinds.append(BYTE)
        else:
            kinds.append(NORMAL)
    writer.add_tokenizer_model(own["model"])
    writer.add_tokenizer_pre(own["pre"])
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    if own["model"] == PIECES:
        ranks = _ranks(own["merges"])
        writer.add_token_scores([-float(ranks.get(word, len(ranks))) for word in words])
        writer.add_add_space_prefix(own["space_prefix"])
        if own["collapsed"]:
            log.warning("llama.cpp keeps repeated spaces of a text, which the tokenizer collapses")
    elif own["merges"]:
        if own["composed"]:
            log.warning("llama.cpp does not compose letters and accents (NFC), the tokenizer does")
        writer.add_token_merges(own["merges"])
    else:  # readers take one of the two
        writer.add_token_scores([0.0] * rows)
    for role in ("bos", "eos", "unk", "pad"):
        if (index := getattr(tokenizer, f"{role}_token_id")) is not None:
            writer.add_uint32(f"tokenizer.ggml.{ROLES.get(role, role)}_token_id", index)
    writer.add_add_bos_token(begins(tokenizer) is not None)
    if template := getattr(tokenizer, "chat_template", None):
        writer.add_chat_template(template)


def _ranks(merges: list[str]) -> dict[str, int]:
    """The place of each piece in the order of merges. SentencePiece merges the two pieces whose
    union has the highest score, so that these ranks, negated, are scores."""
    found: dict[str, int] = {}
    for merge in merges:
        found.setdefault(merge.replace(" ", ""), len(found))
    return found


def settings(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """GGUF's name of a tokenizer's kind (`model`), its merges, llama.cpp's name of its
    pre-tokenizer (`pre`), and what a text goes through before it is cut."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = json.loads(backend.to_str()) if backend is not None else {"model": {}}
    model = content["model"]
    merges = [
        pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or []
    ]
    found = None
    if model.get("type") == "BPE":
        found = _bytes(content, merges) or (_pieces(content) if merges else None)
    if found is None:
        raise UserError(
            "model: its tokenizer is none of those that this export writes (byte-level BPE of "
            "gpt-2, smollm, llama 3 or qwen2, or BPE of SentencePiece); say format=float and "
            "convert that folder with llama.cpp's convert_hf_to_gguf.py"
        )
    return {"merges": merges, **found}


def _bytes(content: dict[str, Any], merges: list[str]) -> dict[str, Any] | None:
    before = content.get("pre_tokenizer")
    normalizer = content.get("normalizer")
    if '"ByteLevel"' not in json.dumps(before) or normalizer not in (None, NFC):
        return None
    pre = _pre(before)
    if pre is None and not merges:
        pre = "gpt-2"  # without merges every byte is a token, however a text is cut
    return None if pre is None else {"model": BYTES, "pre": pre, "composed": normalizer == NFC}


def _pieces(content: dict[str, Any]) -> dict[str, Any] | None:
    """Pieces with "▁" for a space, which a normalizer or the pre-tokenizer puts there."""
    normalizer, before = content.get("normalizer"), content.get("pre_tokenizer")
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    prefix, spaces, collapsed = False, False, False
    for step in steps:
        pattern = step.get("pattern", {})
        if step == {"type": "Prepend", "prepend": SPACE}:
            prefix = True
        elif pattern == {"String": " "} and step["content"] == SPACE:
            spaces = True
        elif pattern.get("Regex") in COLLAPSED:
            collapsed = True
        else:
            return None
    if before is not None:
        if before["type"] != "Metaspace" or before["replacement"] != SPACE or spaces:
            return None
        prefix, spaces = before.get("prepend_scheme", "always") != "never", True
    if not content["model"].get("byte_fallback") or not spaces:
        return None
    return {"model": PIECES, "pre": "default", "space_prefix": prefix, "collapsed": collapsed}


def _pre(before: dict[str, Any] | None) -> str | None:
    parts = [] if before is None else before.get("pretokenizers", [before])
    kinds = [part["type"] for part in parts]
    expressions = [part["pattern"].get("Regex") for part in parts if part["type"] == "Split"]
    own = [part.get("use_regex", True) for part in parts if part["type"] == "ByteLevel"]
    if kinds == ["ByteLevel"] and own == [True]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and own == [True] and parts[0]["individual_digits"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and own == [False]:
        return {LLAMA3: "llama-bpe", QWEN2: "qwen2"}.get(expressions[0])
    return None
