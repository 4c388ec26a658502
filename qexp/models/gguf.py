"""GGUF files, dequantized to a float model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGML_QUANT_SIZES, GGUFReader, Keys
from torch import Tensor
from transformers import AutoConfig, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from qexp.common.cache import Cache
from qexp.common.errors import UserError, first_line
from qexp.common.hashes import sha256
from qexp.data.tokens import begins
from qexp.models import rope
from qexp.models.base import AUTO_DTYPE, Loaded, ModelSource, check, ready
from qexp.models.converted import kept
from qexp.models.pretrained import automatic, pretrained, tokenizer_of

FLOATS = {"F16": "float16", "BF16": "bfloat16"}
FLAGS = ("is_quantized", "quantization_method", "hf_quantizer")


@dataclass(frozen=True)
class GGUF(ModelSource):
    """A .gguf file of an architecture that transformers can read, with the tokenizer in it.

    The weights are already values of the file's grid (Q4_1: 4 bits in blocks of 32 columns). To
    round them to the same grid again changes nothing: use fewer bits.
    """

    path: str
    keep: bool = False  # the dequantized model in the cache folder: loads ten times faster
    dtype: str = AUTO_DTYPE
    objective: str = "causal_lm"

    def __post_init__(self) -> None:
        check(self, auto=True)

    def loaded(self) -> Loaded:
        loaded = kept(self, self._read) if self.keep else self._read()
        return loaded._replace(model=ready(loaded.model))

    def _read(self) -> Loaded:
        [path] = self.files()
        where = str(path.parent)
        options: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
        name = f"model.path: {path}"
        reader = _reader(path)
        try:
            # passed on, or both calls below would parse the header again (seconds)
            config = AutoConfig.from_pretrained(where, **options)
            rope.follow(reader, config)
            tokenizer = tokenizer_of(where, name, self, config=config, **options)
            unpack = GgufConfig(dequantize=True)  # even where kernels could compute on the blocks
            model = pretrained(
                where, name, self, config=config, quantization_config=unpack, **options
            )
        except UserError:
            raise
        except Exception as error:  # transformers stumbles over a broken file in many ways
            raise UserError(f"{name} cannot be loaded ({first_line(error)})") from error
        _follow(reader, tokenizer)
        return Loaded(_unflagged(model), tokenizer)

    def fingerprint(self) -> dict[str, str]:
        [path] = self.files()
        return {"gguf": sha256(path), "dtype": self.settled_dtype()}

    def settled_dtype(self) -> str:
        """Of `auto`: the file's own dtype is that of most weights. Those on a grid are products
        and sums of float16 numbers, which float32 alone holds."""
        if self.dtype != AUTO_DTYPE:
            return self.dtype
        weights = {name: each["weights"] for name, each in self.tensor_types().items()}
        most = max(weights, key=lambda name: weights[name], default="F32")
        return automatic(sum(weights.values()), FLOATS.get(most, "float32"))

    def tensor_types(self) -> dict[str, dict[str, int]]:
        [path] = self.files()

        def build() -> dict[str, Tensor]:
            found: dict[str, list[int]] = {}
            for tensor in _reader(path).tensors:
                block, _ = GGML_QUANT_SIZES[tensor.tensor_type]
                counts = found.setdefault(tensor.tensor_type.name, [0, 0, block])
                counts[0] += 1
                counts[1] += int(tensor.n_elements)
            return {name: torch.tensor(counts) for name, counts in found.items()}

        # cached: the reader takes seconds for the vocabulary in front of the tensors
        found = Cache().get("tensor_types", {"gguf": sha256(path)}, build)
        keys = ("tensors", "weights", "block")
        return {
            name: dict(zip(keys, counts.tolist(), strict=True))
            for name, counts in sorted(found.items())
        }

    def files(self) -> list[Path]:
        path = Path(self.path).expanduser()
        if not path.is_file():
            raise UserError(f"model.path: {path} is not a file")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError(f"model.path: {path} is not a GGUF file (its first bytes differ)")
        return [path]


def _follow(reader: GGUFReader, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Put BOS before a text where the file's vocabulary says so, and only there: transformers does
    not read that flag. A file without it leaves the tokenizer as it is."""
    field = reader.get_field(Keys.Tokenizer.ADD_BOS)
    if tokenizer is None or field is None:
        return
    asked = bool(field.contents())
    if asked != (begins(tokenizer) is not None):
        tokenizer.add_bos_token = asked


def _unflagged(model: PreTrainedModel) -> PreTrainedModel:
    """The model without quantization flags, which would forbid .to(dtype), training and saving."""
    for flag in FLAGS:
        model.__dict__.pop(flag, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def _reader(path: Path) -> GGUFReader:
    """UserError if the file ends before its last tensor, or its header makes no sense."""
    try:
        return GGUFReader(path)
    except Exception as error:
        raise UserError(
            f"model.path: {path} is a corrupt or truncated GGUF file ({first_line(error)}); "
            "fetch it again"
        ) from error
