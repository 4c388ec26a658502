"""GGUF files of quantized models for llama.cpp: written, and read back."""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qexp.common.errors import UserError
from qexp.models import gguf_vocabulary, rope
from qexp.models.linearize import published
from qexp.packed.coded import Coded
from qexp.packed.formats import gguf as blocks

# transformers' family → llama.cpp's architecture
FAMILIES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
PERMUTED = ("llama", "mistral")  # rows of queries and keys are in pairs, not in halves
FILE_TYPES = {"Q4_0": 2, "Q8_0": 7, "Q5_0": 8}
logging.getLogger("gguf.gguf_writer").setLevel(logging.WARNING)  # it names temporary files
FACTS = "qexp.facts"  # key with the JSON of the run's facts


@dataclass(frozen=True)
class Content:
    """What goes into a file. origin: the GGUF file from which the tokenizer is copied. container:
    the block type of all matrices; None: the smallest that holds each."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    coded: Mapping[str, Coded]
    origin: Path | None = None
    container: str | None = None

    def check(self) -> None:
        """UserError for a model or a tokenizer that no file can hold."""
        config = self.model.config
        if config.model_type not in FAMILIES:
            raise UserError(
                f"model: format=gguf holds the families {', '.join(FAMILIES)}, not "
                f"{config.model_type}"
            )
        rope.check(config)
        if self.origin is None:
            if self.tokenizer is None:
                raise UserError("model: format=gguf needs a tokenizer")
            gguf_vocabulary.settings(self.tokenizer)

    def summary(self) -> tuple[list[str], float]:
        """The block types of the file and the bits per weight of its quantized linears. UserError
        as `check`, and for a matrix that `container` does not hold."""
        self.check()
        names = {name: self._type(name, each) for name, each in self.coded.items()}
        weights = sum(each.codes.numel() for each in self.coded.values())
        size = sum(
            8 * blocks.TYPES[names[name]][1] * each.codes.numel()
            for name, each in self.coded.items()
        )
        return sorted(set(names.values())), size / blocks.BLOCK / weights

    def _type(self, name: str, coded: Coded) -> str:
        least = blocks.container(coded)
        assert least is not None, "refusal says so before"
        wanted = least if self.container is None else self.container
        if blocks.TYPES[wanted] < blocks.TYPES[least]:
            raise UserError(f"container={wanted}: the codes need {least} ({name})")
        return wanted


def write(path: Path, content: Content, facts: Mapping[str, Any]) -> None:
    """Write the file. Float tensors are float32."""
    model, coded = content.model, content.coded
    kinds, _ = content.summary()
    writer = GGUFWriter(path, FAMILIES[model.config.model_type])
    _add_config(writer, model, FILE_TYPES[kinds[-1]])
    writer.add_string(FACTS, json.dumps(facts))
    rows = len(model.get_input_embeddings().weight)
    if content.origin is not None:
        gguf_vocabulary.copy(writer, content.origin)
    else:
        assert content.tokenizer is not None
        gguf_vocabulary.write(writer, content.tokenizer, rows)
    state = published(model)
    for name, own, heads in _names(model):
        layer = name.removesuffix(".weight")
        if name.endswith(".weight") and layer in coded:
            kind, data = blocks.write(coded[layer], content.container)
            writer.add_tensor(
                own, permute(data.numpy(), heads), raw_dtype=GGMLQuantizationType[kind]
            )
        else:
            writer.add_tensor(own, permute(state[name].float().numpy(), heads))
    if (factors := rope.factors(model.config)) is not None:
        writer.add_tensor(rope.TENSOR, factors.numpy())
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def read(path: Path, model: PreTrainedModel) -> tuple[dict[str, Coded], dict[str, Tensor]]:
    """Coded matrices by the linear's name and other tensors by theirs, in transformers' order."""
    stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    matrices, others = {}, {}
    for name, own, heads in _names(model):
        if own not in stored:
            raise RuntimeError(f"{own}: is not in the file")
        tensor = stored.pop(own)
        data = torch.from_numpy(_unpermute(np.array(tensor.data), heads))
        if tensor.tensor_type == GGMLQuantizationType.F32:
            others[name] = data
        else:
            matrices[name.removesuffix(".weight")] = blocks.read(tensor.tensor_type.name, data)
    factors, held = rope.factors(model.config), stored.pop(rope.TENSOR, None)
    one, other = (None if each is None else each.tolist() for each in (factors, held and held.data))
    if one != other:
        raise RuntimeError(f"{rope.TENSOR}: does not hold the model's rotary frequencies")
    if stored:
        raise RuntimeError(f"{next(iter(stored))}: is in the file and not in the model")
    return matrices, others


def permute(rows: np.ndarray, heads: int | None) -> np.ndarray:
    """Rows of a projection from transformers' rotation of halves to neighbouring pairs; unchanged
    for heads=None."""
    if heads is None:
        return rows
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def _unpermute(rows: np.ndarray, heads: int | None) -> np.ndarray:
    if heads is None:
        return rows
    pairs = rows.reshape(heads, len(rows) // heads // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _names(model: PreTrainedModel) -> Iterator[tuple[str, str, int | None]]:
    """The name of each tensor, its name in the file, and the heads of permuted ones."""
    config = model.config
    kind = {own: key for key, own in gguf.MODEL_ARCH_NAMES.items()}[FAMILIES[config.model_type]]
    known = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    permuted = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name in published(model):
        if name.startswith("lm_head.") and config.tie_word_embeddings:
            continue
        own = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if own is None:
            raise UserError(f"model: format=gguf has no place for {name}")
        heads = permuted.get(name.split(".")[-2]) if config.model_type in PERMUTED else None
        yield name, own, heads


def _add_config(writer: GGUFWriter, model: PreTrainedModel, file_type: int) -> None:
    config = model.config
    width, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or width // heads
    writer.add_name(f"{config.model_type} quantized by qexp")
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(width)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(len(model.get_input_embeddings().weight))
    writer.add_key_length(head)
    writer.add_value_length(head)
