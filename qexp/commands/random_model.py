"""A model folder of random weights of any size, for measurements of memory and time."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from qexp.common.files import atomic_folder
from qexp.models import export
from qexp.models.random import byte_tokenizer
from qexp.runs.results import write_json

STD = 0.02  # of the weights, transformers' `initializer_range`


def main(arguments: Sequence[str]) -> None:
    """Writes a random Llama in bfloat16, one shard for each block, and keeps one tensor in
    memory."""
    parser = argparse.ArgumentParser("qexp random-model", description=main.__doc__)
    parser.add_argument("out", type=Path, help="a new folder")
    for name, size in (("hidden", 3072), ("inner", 8192), ("blocks", 28), ("heads", 24)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    export.check(given.out)
    config = LlamaConfig(
        hidden_size=given.hidden,
        intermediate_size=given.inner,
        num_hidden_layers=given.blocks,
        num_attention_heads=given.heads,
        num_key_value_heads=given.kv_heads,
        vocab_size=given.vocabulary,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    with atomic_folder(given.out) as folder:
        config.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        size = _write(folder, model, torch.Generator().manual_seed(given.seed))
    print(f"{given.out}: {model.num_parameters() / 1e9:.2f} B weights, {size / 2**30:.2f} GiB")


def _write(folder: Path, model: LlamaForCausalLM, generator: torch.Generator) -> int:
    """Write the shards and their index; the bytes of all weights."""
    weight_map: dict[str, str] = {}
    size = 0
    for number, names in enumerate(_shards(model)):
        path = folder / f"model-{number:05}.safetensors"
        tensors = {name: _random(model.get_parameter(name), generator) for name in names}
        save_file(tensors, path, {"format": "pt"})
        weight_map |= dict.fromkeys(names, path.name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_json(folder / SAFE_WEIGHTS_INDEX_NAME, index)
    return size


def _shards(model: LlamaForCausalLM) -> Iterator[list[str]]:
    names = [name for name, _ in model.named_parameters()]
    for index in range(model.config.num_hidden_layers):
        yield [name for name in names if name.startswith(f"model.layers.{index}.")]
    yield [name for name in names if not name.startswith("model.layers.")]


def _random(parameter: Tensor, generator: torch.Generator) -> Tensor:
    """Norms of one, weights of a normal distribution."""
    if parameter.ndim == 1:
        return torch.ones(parameter.shape, dtype=torch.bfloat16)
    weight = torch.empty(parameter.shape, dtype=torch.bfloat16)
    return weight.normal_(std=STD, generator=generator)
