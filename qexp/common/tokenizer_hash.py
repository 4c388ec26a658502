"""Content hash of a tokenizer."""

import hashlib
import json

from transformers import PreTrainedTokenizerBase


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """The sha256 of everything that turns text into ids: rules, vocabulary, special tokens."""
    if tokenizer.is_fast:
        rules = tokenizer.backend_tokenizer.to_str()
    else:  # a slow tokenizer's rules are its class
        rules = json.dumps([type(tokenizer).__qualname__, sorted(tokenizer.get_vocab().items())])
    special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    return hashlib.sha256(f"{rules}\n{special}".encode()).hexdigest()
