"""Local models: a folder of float or quantized weights, or a GGUF file."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
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
from qexp.models.shards import STREAM, check_load, safetensors_of, streamed, weight_files
from qexp.task import Task

# one of these is enough for a tokenizer, with or without further files
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


@dataclass(frozen=True)
class Local(ModelSource):
    """path: a folder with config.json, weights and tokenizer, or a .gguf file.

    Weights may be codes of compressed-tensors, GPTQ, AWQ, MLX or NF4; they are dequantized in
    float32, and the inputs of linears are rounded where the checkpoint says so.

    load: `whole`, or `stream`: float weights stay in mapped files, of which only the pages in use
    are in memory.
    """

    path: str
    dtype: str = AUTO_DTYPE
    objective: str = "causal_lm"
    head: Head | None = None
    load: str = "whole"

    def __post_init__(self) -> None:
        check(self, auto=True)
        check_load(self.load, self.head)

    def loaded(self) -> Loaded:
        if gguf := self._gguf():
            if self.load == STREAM:
                raise UserError(
                    f"model.load=stream: {self.path} is decoded as a whole; say "
                    "model.load=whole, or give a folder of safetensors"
                )
            return gguf.loaded()
        folder, name = self._folder(), f"model.path: {self.path}"
        self.files()  # a UserError that names a missing file
        try:
            stored = code_formats.section(json.loads((folder / "config.json").read_text()), name)
            if stored is not None:
                model, finish = _dequantized(folder, self, name, *stored)
            elif self.load == STREAM:
                model, finish = _streamed(folder, name, self), _nothing
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

    def config_folder(self) -> Path | None:
        return None if self._gguf() else self._folder()

    def files(self) -> list[Path]:
        """Every file of the folder that belongs to the model. UserError for a missing one."""
        if gguf := self._gguf():
            return gguf.files()
        folder = self._folder()
        if not (folder / "config.json").is_file():
            raise UserError(f"model.path: {folder} is not a model folder: it has no config.json")
        weights = weight_files(folder)
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


def _streamed(folder: Path, where: str, source: Local) -> PreTrainedModel:
    tensors = code_formats.tensors(safetensors_of(folder, "model.load=stream: reads"), where)
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    return streamed(folder, tensors.items(), config, where, source)


def _dequantized(
    folder: Path,
    source: Local,
    where: str,
    format: code_formats.CodeFormat,
    section: dict[str, Any],
) -> tuple[PreTrainedModel, Callable[[Task], None]]:
    """The float model of a checkpoint of codes, and what attaches the quantizers of its inputs."""
    paths = safetensors_of(folder, f"{where}: codes are read")
    state = code_formats.tensors(paths, where)
    matrices, others, linears = code_formats.separate(state, format, section, where)
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    weights = ((f"{name}.weight", coded.dequantize()) for name, coded in matrices.items())
    if source.load == STREAM:
        model = streamed(folder, chain(weights, others.items()), config, where, source)
    else:
        model = from_state(dict(chain(weights, others.items())), config, where, source)
    groups = section.get("config_groups", {}).values()
    schemes = [group.get("input_activations") for group in groups]
    return model, input_ranges.attached(schemes, linears, where)
