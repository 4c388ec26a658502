"""Random models of any family: small, seeded, no network."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from qexp.errors import UserError
from qexp.models.source import AUTO, DTYPES, Loaded, Source, check, ready

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>"}


@dataclass(frozen=True)
class Random(Source):
    """A transformers config of `family` with `sizes`, initialized from `seed`.

    Biases and norm weights get normal noise (std 0.1): at their usual zeros and ones a mistake
    with them would stay unseen. Language models come with a tokenizer of the 256 bytes.
    """

    family: str
    sizes: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    dtype: str = "float32"
    objective: str = "causal_lm"

    def __post_init__(self) -> None:
        check(self)

    def load(self) -> Loaded:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = AUTO[self.objective].from_config(self._config(), dtype=torch.float32)
            _disturb(model)
        images = self.objective == "image_classification"
        tokenizer = None if images else byte_tokenizer()
        return Loaded(ready(model.to(DTYPES[self.dtype])), tokenizer)

    def fingerprint(self) -> dict[str, str]:
        loaded = self.load()
        digest = hashlib.sha256(loaded.model.config.to_json_string().encode())
        for name, tensor in loaded.model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        tokenizer = "none" if loaded.tokenizer is None else "bytes"
        return {"weights": digest.hexdigest(), "tokenizer": tokenizer, "dtype": self.dtype}

    def files(self) -> list[Path]:
        return []

    def _config(self) -> PreTrainedConfig:
        try:
            known = AutoConfig.for_model(self.family)
        except ValueError as error:
            raise UserError(
                f"model.family: {self.family!r} is no model type of transformers"
            ) from error
        if unknown := [key for key in self.sizes if not hasattr(known, key)]:
            raise UserError(f"model.sizes.{unknown[0]}: {type(known).__name__} has no such field")
        return AutoConfig.for_model(self.family, **self.sizes)


def _disturb(model: PreTrainedModel) -> None:
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """256 bytes, then <s> </s> <pad> <mask>: 260 tokens, any text, nothing added by itself."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)
