"""Tokenizers in GGUF files: copied from the file that a model came from, or byte-level BPE."""

import json
from pathlib import Path
from typing import Any

from gguf import GGUFReader, GGUFWriter
from transformers import PreTrainedTokenizerBase

from qexp.common.errors import UserError
from qexp.data.tokens import begins

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
PREFIX = "tokenizer."
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
    """The keys of a byte-level BPE tokenizer; rows: of the embedding, unused ones included.

    Raises UserError for tokenizers of another kind.
    """
    model = settings(tokenizer)
    added = tokenizer.added_tokens_decoder
    words, kinds = [], []
    for index in range(rows):
        word = tokenizer.convert_ids_to_tokens(index) if index < len(tokenizer) else None
        words.append(f"[PAD{index}]" if word is None else word)
        if word is None:
            kinds.append(UNUSED)
        elif index in added:
            kinds.append(CONTROL if added[index].special else USER_DEFINED)
        else:
            kinds.append(NORMAL)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(model["pre"])
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    if merges:
        writer.add_token_merges(merges)
    else:  # readers take one of the two
        writer.add_token_scores([0.0] * rows)
    for role in ("bos", "eos", "unk", "pad"):
        if (index := getattr(tokenizer, f"{role}_token_id")) is not None:
            writer.add_uint32(f"tokenizer.ggml.{ROLES.get(role, role)}_token_id", index)
    writer.add_add_bos_token(begins(tokenizer) is not None)
    if template := getattr(tokenizer, "chat_template", None):
        writer.add_chat_template(template)


def settings(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Merges of a byte-level BPE tokenizer and llama.cpp's name of its pre-tokenizer (`pre`)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = json.loads(backend.to_str()) if backend is not None else {"model": {}}
    model, before = content["model"], content.get("pre_tokenizer")
    pre = _pre(before)
    if not model.get("merges"):
        pre = pre or "gpt-2"  # without merges every byte is a token, however a text is cut
    bytes_ = '"ByteLevel"' in json.dumps(before)
    if model.get("type") != "BPE" or not bytes_ or content.get("normalizer") or pre is None:
        raise UserError(
            "model: its tokenizer is none of those that this export writes (byte-level BPE of "
            "gpt-2, smollm, llama 3 or qwen2); say format=float and convert that folder with "
            "llama.cpp's convert_hf_to_gguf.py"
        )
    return {"merges": model.get("merges", []), "pre": pre}


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
