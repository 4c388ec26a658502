"""Local models: a folder of float or quantized weights, or a GGUF file."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedModel

from qexp.common.errors import UserError, first_line
from qexp.common.hashes import sha256
from qexp.models import code_formats, input_ranges
from qexp.models.base import AUTO_DTYPE, Loaded, ModelSource, check, ready
from qexp.models.gguf import GGUF
from qexp.models.pretrained import (
    Head,
    checkpoint_dtype,
    from_state,
    marked,
    pretrained,
    tokenizer_of,
)
from qexp.task import Task

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# one of these is enough for a tokenizer, with or without further files
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


@dataclass(frozen=True)
class Local(ModelSource):
    """path: a folder with config.json, weights and tokenizer, or a .gguf file.

    Weights may be codes of compressed-tensors, GPTQ, AWQ, MLX or NF4; they are dequantized in
    float32, and the inputs of linears are rounded where the checkpoint says so.
    """

    path: str
    dtype: str = AUTO_DTYPE
    objective: str = "causal_lm"
    head: Head | None = None

    def __post_init__(self) -> None:
        check(self, auto=True)

    def load(self) -> Loaded:
        if gguf := self._gguf():
            return gguf.load()
        folder, name = self._folder(), f"model.path: {self.path}"
        self.files()  # a UserError that names a missing file
        try:
            stored = code_formats.section(json.loads((folder / "config.json").read_text()), name)
            if stored is not None:
                model, finish = _dequantized(folder, self, name, *stored)
            else:
                model = pretrained(str(folder), name, self, self.head, local_files_only=True)
                finish = _nothing
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{name} cannot be loaded ({first_line(error)})") from error
        tokenizer = tokenizer_of(str(folder), name, self, local_files_only=True)
        return Loaded(ready(model), tokenizer, finish)

    def fingerprint(self) -> dict[str, str]:
        if gguf := self._gguf():
            return gguf.fingerprint()
        sums = {path.name: sha256(path) for path in self.files()}
        return marked(sums | {"dtype": self.settled_dtype()}, self.head)

    def settled_dtype(self) -> str:
        if gguf := self._gguf():
            return gguf.settled_dtype()
        if self.dtype != AUTO_DTYPE:
            return self.dtype
        return checkpoint_dtype(str(self._folder()), f"model.path: {self.path}", self)

    def files(self) -> list[Path]:
        """Every file of the folder that belongs to the model. UserError for a missing one."""
        if gguf := self._gguf():
            return gguf.files()
        folder = self._folder()
        if not (folder / "config.json").is_file():
            raise UserError(f"model.path: {folder} is not a model folder: it has no config.json")
        weights = _weights(folder)
        texts = self.objective != "image_classification"
        if texts and not any((folder / name).is_file() for name in TOKENIZERS):
            raise UserError(
                f"model.path: {folder} has no tokenizer ({' or '.join(TOKENIZERS)}); "
                "save the tokenizer there too"
            )
        small = [
            path
            for path in folder.iterdir()
            if path.suffix in (".json", ".txt", ".model") and path not in weights
        ]
        return sorted([*weights, *small])

    def tensor_types(self) -> dict[str, dict[str, int]]:
        gguf = self._gguf()
        return gguf.tensor_types() if gguf else {}

    def _gguf(self) -> GGUF | None:
        path = Path(self.path).expanduser()
        if path.suffix == ".gguf":
            return GGUF(str(path), dtype=self.dtype, objective=self.objective)
        return None

    def _folder(self) -> Path:
        folder = Path(self.path).expanduser()
        if not folder.exists():
            raise UserError(f"model.path: {folder} does not exist")
        if not folder.is_dir():
            raise UserError(f"model.path: {folder} is neither a folder nor a .gguf file")
        return folder


def _nothing(task: Task) -> None:
    """Nothing is attached to a float model."""


def _dequantized(
    folder: Path,
    source: ModelSource,
    where: str,
    format: code_formats.CodeFormat,
    section: dict[str, Any],
) -> tuple[PreTrainedModel, Callable[[Task], None]]:
    """The float model of a checkpoint of codes, and what attaches the quantizers of its inputs."""
    paths = [path for path in _weights(folder) if path.suffix != ".json"]
    if any(path.suffix != ".safetensors" for path in paths):
        raise UserError(f"{where}: codes are read from safetensors files, not from {paths[0].name}")
    state = code_formats.tensors(paths, where)
    matrices, others, linears = code_formats.separate(state, format, section, where)
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    weights = {f"{name}.weight": coded.dequantize() for name, coded in matrices.items()}
    model = from_state(weights | others, config, where, source)
    groups = section.get("config_groups", {}).values()
    schemes = [group.get("input_activations") for group in groups]
    return model, input_ranges.attached(schemes, linears, where)


def _weights(folder: Path) -> list[Path]:
    """The weight files of a folder, one file or shards; safetensors are preferred."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if not index.is_file():
            continue
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"model.path: {index} is not a weight index") from error
        for shard in shards:
            if not (folder / shard).is_file():
                raise UserError(f"model.path: {folder} has no {shard}, which {index.name} names")
        return [index, *(folder / shard for shard in shards)]
    raise UserError(f"model.path: {folder} has no weights ({' or '.join(WEIGHTS)}, or shards)")
