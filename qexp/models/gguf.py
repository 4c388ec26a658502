"""GGUF files, dequantized: from here on a float model like any other."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFReader
from transformers import AutoConfig, GgufConfig, PreTrainedModel

from qexp.common.errors import UserError
from qexp.common.hashes import sha256
from qexp.models.base import Loaded, ModelSource, check, ready
from qexp.models.converted import kept
from qexp.models.pretrained import first_line, pretrained, tokenizer_of

FLAGS = ("is_quantized", "quantization_method", "hf_quantizer")


@dataclass(frozen=True)
class GGUF(ModelSource):
    """A .gguf file of an architecture that transformers can read, with the tokenizer inside it.

    The weights sit on the file's own grid already (Q4_1: 4 bits in blocks of 32 columns), so
    rounding them to that same grid again would cost nothing: quantize below it.
    """

    path: str
    keep: bool = False  # the dequantized model in the cache folder: loads ten times faster
    dtype: str = "float32"
    objective: str = "causal_lm"

    def __post_init__(self) -> None:
        check(self)

    def load(self) -> Loaded:
        loaded = kept(self, self._read) if self.keep else self._read()
        return loaded._replace(model=ready(loaded.model))

    def _read(self) -> Loaded:
        [path] = self.files()
        where = str(path.parent)
        options: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
        name = f"model.path: {path}"
        try:
            # handed on, or each of the two below would parse the header (seconds) once more
            config = AutoConfig.from_pretrained(where, **options)
            tokenizer = tokenizer_of(where, name, self, config=config, **options)
            unpack = GgufConfig(dequantize=True)  # even where kernels could compute on the blocks
            model = pretrained(
                where, name, self, config=config, quantization_config=unpack, **options
            )
        except UserError:
            _check_whole(path)
            raise
        except Exception as error:  # the reader stumbles over a broken file in many ways
            _check_whole(path)
            raise UserError(f"{name} cannot be loaded ({first_line(error)})") from error
        return Loaded(_unflagged(model), tokenizer)

    def fingerprint(self) -> dict[str, str]:
        [path] = self.files()
        return {"gguf": sha256(path), "dtype": self.dtype}

    def files(self) -> list[Path]:
        path = Path(self.path).expanduser()
        if not path.is_file():
            raise UserError(f"model.path: {path} is not a file")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError(f"model.path: {path} is not a GGUF file (its first bytes differ)")
        return [path]


def _unflagged(model: PreTrainedModel) -> PreTrainedModel:
    """Its weights are floats now; the flags would forbid .to(dtype), training and saving."""
    for flag in FLAGS:
        model.__dict__.pop(flag, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def _check_whole(path: Path) -> None:
    """UserError if the file ends before its last tensor, or its header makes no sense."""
    try:
        GGUFReader(path)
    except Exception as error:
        raise UserError(
            f"model.path: {path} is a corrupt or truncated GGUF file ({first_line(error)}); "
            "fetch it again"
        ) from error
