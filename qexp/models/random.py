"""Randomly initialized models of any family, seeded; they need no network."""

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

from qexp.common.errors import UserError
from qexp.common.files import locate
from qexp.common.tokenizer_hash import fingerprint
from qexp.grid.scale import DTYPES
from qexp.models.base import AUTO, Loaded, ModelSource, check, ready
from qexp.models.pretrained import tokenizer_of

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>"}


@dataclass(frozen=True)
class Random(ModelSource):
    """A transformers config of `family` with `sizes`, initialized from `seed`.

    noise: standard deviation of the noise on biases and norm weights. With their usual zeros and
    ones, tests would not detect errors in them.
    tokenizer: its folder, also looked for below QEXP_DATA_DIR; null: `byte_tokenizer`.
    """

    family: str
    sizes: dict[str, Any] = field(default_factory=dict)
    noise: float | int = 0.1
    tokenizer: str | None = None
    seed: int = 0
    dtype: str = "float32"
    objective: str = "causal_lm"

    def __post_init__(self) -> None:
        check(self)

    def loaded(self) -> Loaded:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = AUTO[self.objective].from_config(self._config(), dtype=torch.float32)
            _disturb(model, self.noise)
        return Loaded(ready(model.to(DTYPES[self.dtype])), self._tokenizer())

    def fingerprint(self) -> dict[str, str]:
        loaded = self.loaded()
        digest = hashlib.sha256(loaded.model.config.to_json_string().encode())
        for name, tensor in loaded.model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        rules = "none" if loaded.tokenizer is None else fingerprint(loaded.tokenizer)
        return {"weights": digest.hexdigest(), "tokenizer": rules, "dtype": self.dtype}

    def files(self) -> list[Path]:
        if self.tokenizer is None:
            return []
        folder = locate(self.tokenizer)
        if not folder.is_dir():
            raise UserError(
                f"model.tokenizer: {folder} is not a folder; give one with vocab.json, or set "
                "QEXP_DATA_DIR"
            )
        return sorted(path for path in folder.iterdir() if path.is_file())

    def _tokenizer(self) -> PreTrainedTokenizerBase | None:
        if self.objective == "image_classification":
            return None
        if self.tokenizer is None:
            return byte_tokenizer()
        name = f"model.tokenizer: {self.tokenizer}"
        # The folder may contain only a vocabulary; its kind is then that of the family.
        options = {"config": self._config(), "local_files_only": True}
        return tokenizer_of(str(locate(self.tokenizer)), name, self, **options)

    def _config(self) -> PreTrainedConfig:
        try:
            known = AutoConfig.for_model(self.family)
        except ValueError as error:
            raise UserError(
                f"model.family: {self.family!r} is not a model type of transformers"
            ) from error
        if unknown := [key for key in self.sizes if not hasattr(known, key)]:
            raise UserError(f"model.sizes.{unknown[0]}: {type(known).__name__} has no such field")
        return AutoConfig.for_model(self.family, **self.sizes)


def _disturb(model: PreTrainedModel, noise: float) -> None:
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += noise * torch.randn_like(parameter)


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """256 bytes, <s>, </s>, <pad> and <mask>: 260 tokens; adds no special tokens to a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)
