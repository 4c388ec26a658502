"""Checkpoints of llama2.c (.bin, version 0), loaded as transformers' Llama."""

import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float32
from sentencepiece import SentencePieceProcessor
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, processors
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from qexp.common.errors import UserError
from qexp.common.files import locate
from qexp.common.hashes import sha256
from qexp.grid.scale import DTYPES
from qexp.models.base import Loaded, ModelSource, check, ready

HEADER = struct.Struct("<7i")


@dataclass(frozen=True)
class Llama2C(ModelSource):
    """path: the .bin file. tokenizer: its sentencepiece model. Both may be below QEXP_DATA_DIR.

    Layout (github.com/karpathy/llama2.c, `legacy_export`): seven int32, then float32 weights by
    kind, each for all layers. RoPE rotates adjacent pairs there and halves in transformers, so the
    rows of wq and wk are permuted.
    """

    path: str
    tokenizer: str
    dtype: str = "float32"
    objective: str = "causal_lm"

    def __post_init__(self) -> None:
        check(self)

    def loaded(self) -> Loaded:
        path, tokenizer = self.files()
        config, weights = _header(path)
        with torch.random.fork_rng(devices=[]):  # keeps the caller's random state
            model = LlamaForCausalLM(config)
        model.load_state_dict(_state(config, weights), strict=False)
        model.tie_weights()
        return Loaded(ready(model.to(DTYPES[self.dtype])), sentencepiece_tokenizer(tokenizer))

    def fingerprint(self) -> dict[str, str]:
        path, tokenizer = self.files()
        return {"weights": sha256(path), "tokenizer": sha256(tokenizer), "dtype": self.dtype}

    def files(self) -> list[Path]:
        files = []
        for key in ("path", "tokenizer"):
            file = locate(getattr(self, key))
            if not file.is_file():
                raise UserError(
                    f"model.{key}: {file} is not a file; set QEXP_DATA_DIR to its data folder"
                )
            files.append(file)
        return files


def _header(path: Path) -> tuple[LlamaConfig, Float32[Tensor, " numbers"]]:
    """The configuration and all weights; UserError where the file size contradicts the header."""
    content = bytearray(path.read_bytes())
    if len(content) < HEADER.size:
        raise UserError(f"model.path: {path} is shorter than the header of a llama2.c file")
    dim, hidden, layers, heads, kv_heads, vocab, length = HEADER.unpack_from(content)
    sizes = (dim, hidden, layers, heads, kv_heads, length)
    if min(sizes) < 1 or vocab == 0 or dim % heads or heads % kv_heads or dim // heads % 2:
        raise UserError(f"model.path: {path} does not start with the header of a llama2.c file")
    config = LlamaConfig(
        vocab_size=abs(vocab),
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=vocab > 0,  # a negative size means a separate lm_head
        bos_token_id=1,
        eos_token_id=2,
    )
    expected = HEADER.size + 4 * sum(shape.numel() for _, shape in _layout(config))
    if len(content) != expected:
        raise UserError(
            f"model.path: {path} has {len(content)} bytes, but its header requires {expected}: "
            "truncated, or not in the format of llama2.c version 0"
        )
    return config, torch.frombuffer(content, dtype=torch.float32, offset=HEADER.size)


def _layout(config: LlamaConfig) -> list[tuple[str, torch.Size]]:
    """Names and shapes of the tensors in file order; `{}` is the layer index, the first axis."""
    dim, hidden, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    size = dim // config.num_attention_heads
    values = size * config.num_key_value_heads
    attention, mlp = "model.layers.{}.self_attn", "model.layers.{}.mlp"
    table = (config.max_position_embeddings, size // 2)
    shapes: list[tuple[str, tuple[int, ...]]] = [
        ("model.embed_tokens.weight", (config.vocab_size, dim)),
        ("model.layers.{}.input_layernorm.weight", (layers, dim)),
        (f"{attention}.q_proj.weight", (layers, dim, dim)),
        (f"{attention}.k_proj.weight", (layers, values, dim)),
        (f"{attention}.v_proj.weight", (layers, values, dim)),
        (f"{attention}.o_proj.weight", (layers, dim, dim)),
        ("model.layers.{}.post_attention_layernorm.weight", (layers, dim)),
        (f"{mlp}.gate_proj.weight", (layers, hidden, dim)),
        (f"{mlp}.down_proj.weight", (layers, dim, hidden)),
        (f"{mlp}.up_proj.weight", (layers, hidden, dim)),
        ("model.norm.weight", (dim,)),
        ("", table),  # RoPE's cosines and sines, which transformers computes
        ("", table),
    ]
    if not config.tie_word_embeddings:
        shapes.append(("lm_head.weight", (config.vocab_size, dim)))
    return [(name, torch.Size(shape)) for name, shape in shapes]


def _state(config: LlamaConfig, weights: Float32[Tensor, " numbers"]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    start = 0
    size = config.hidden_size // config.num_attention_heads
    for name, shape in _layout(config):
        tensor = weights[start : start + shape.numel()].view(shape)
        start += shape.numel()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            pairs = tensor.view(shape[0], shape[1] // size, size // 2, 2, shape[2])
            tensor = pairs.transpose(2, 3).reshape(shape)
        if "{}" in name:
            state |= {name.format(layer): tensor[layer] for layer in range(shape[0])}
        elif name:
            state[name] = tensor
    return state


def sentencepiece_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """A BPE sentencepiece model as a fast tokenizer; <s> is prepended as a special token.

    Sentencepiece merges the two pieces whose union has the highest score, so merges in order of
    that score give the same tokenizer. Repeated spaces are collapsed, as in the training text.
    """
    try:
        pieces = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise UserError(f"model.tokenizer: {path} is not a sentencepiece model") from error
    vocabulary = {pieces.id_to_piece(index): index for index in range(len(pieces))}
    ranked = []
    for piece, index in vocabulary.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary and not pieces.is_control(index):
                order = (-pieces.get_score(index), vocabulary[left], vocabulary[right])
                ranked.append((order, (left, right)))
    unknown, begin, end = (
        pieces.id_to_piece(index) for index in (pieces.unk_id(), pieces.bos_id(), pieces.eos_id())
    )
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            [merge for _, merge in sorted(ranked)],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=pieces.is_byte(pieces.piece_to_id("<0x00>")),
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(r"\A +| +\z"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
            normalizers.Prepend("▁"),
            normalizers.Replace(" ", "▁"),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A",
        pair=f"{begin} $A {begin} $B",
        special_tokens=[(begin, pieces.bos_id())],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unknown, bos_token=begin, eos_token=end
    )
