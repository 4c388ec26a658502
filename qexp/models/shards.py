"""Weight files of a model folder, and models that leave their weights on disk."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from qexp.common import on_disk
from qexp.common.errors import UserError
from qexp.grid.scale import DTYPES
from qexp.models.base import ModelSource, ready
from qexp.models.pretrained import Head, from_state, skeleton

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
STREAM = "stream"
LOADS = ("whole", STREAM)


def check_load(load: str, head: Head | None) -> None:
    """UserError for an unknown `model.load`, and for a new head, which only training makes use
    of."""
    if load not in LOADS:
        raise UserError(f"model.load={load}: is unknown; give {' or '.join(LOADS)}")
    if load == STREAM and head is not None:
        raise UserError(
            "model.load=stream: a new head (model.head) is trained, which needs the whole model; "
            "say model.load=whole"
        )


def weight_files(folder: Path) -> list[Path]:
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


def safetensors_of(folder: Path, kind: str) -> list[Path]:
    """The weight files of a folder. UserError where they have another format; kind: what is read,
    for the message."""
    paths = [path for path in weight_files(folder) if path.suffix != ".json"]
    if any(path.suffix != ".safetensors" for path in paths):
        raise UserError(f"{kind} from safetensors files, not from {paths[0].name}")
    return paths


def streamed(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    config: PreTrainedConfig,
    name: str,
    source: ModelSource,
) -> PreTrainedModel:
    """The model of these tensors, all of them in mapped files (`qexp.common.on_disk`), equal to the
    one that is loaded whole. Linears of GPT-2's kind, stored transposed, are in memory for the time
    of loading. UserError where there is no room.

    folder: of the checkpoint. name: the config key and value, for error messages.
    """
    dtype, state = DTYPES[source.settled_dtype()], {}
    weights = skeleton(config, source).num_parameters()
    on_disk.check_room(weights * dtype.itemsize, "model.load=stream")
    for key, tensor in tensors:  # one at a time in memory
        state[key] = on_disk.copied(tensor, dtype if tensor.is_floating_point() else None)
    with torch.random.fork_rng(devices=[]):
        model = ready(from_state(state, config, name, source))
    for parameter in model.parameters():
        if not on_disk.is_mapped(parameter):
            parameter.data = on_disk.copied(parameter)
    if (folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder))
    return model
