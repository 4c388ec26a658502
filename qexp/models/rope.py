"""Scaled rotary frequencies in GGUF files: one factor for each pair of channels."""

import torch
from gguf import GGUFReader
from jaxtyping import Float
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qexp.common.errors import UserError

TENSOR = "rope_freqs.weight"  # the plain frequencies divided by the model's
PLAIN, LLAMA3, LISTED = "default", "llama3", "longrope"


def check(config: PretrainedConfig) -> None:
    """UserError for rotary embeddings that one factor for each pair does not describe."""
    own = config.rope_parameters
    kind = own.get("rope_type", PLAIN)
    listed = kind == LISTED and own["short_factor"] == own["long_factor"]
    if kind not in (PLAIN, LLAMA3) and not (listed and own.get("attention_factor") == 1.0):
        raise UserError(
            f"model: format=gguf holds rotary embeddings of rope_type default and llama3, not "
            f"{kind}; say format=float and convert that folder with llama.cpp's "
            "convert_hf_to_gguf.py"
        )


def factors(config: PretrainedConfig) -> Float[Tensor, " pairs"] | None:
    """The content of TENSOR; None for plain frequencies."""
    kind = config.rope_parameters.get("rope_type", PLAIN)
    if kind == PLAIN:
        return None
    if kind == LISTED:
        return torch.tensor(config.rope_parameters["long_factor"])
    scaled, _ = ROPE_INIT_FUNCTIONS[kind](config)
    width = 2 * len(scaled)
    powers = torch.arange(0, width, 2, dtype=torch.float32) / width
    return 1.0 / (config.rope_parameters["rope_theta"] ** powers) / scaled


def follow(reader: GGUFReader, config: PretrainedConfig) -> None:
    """Put the factors of a file into the configuration, which transformers does not."""
    tensor = next((each for each in reader.tensors if each.name == TENSOR), None)
    if tensor is None:
        return
    held = torch.from_numpy(tensor.data.copy()).tolist()
    config.rope_parameters = config.rope_parameters | {
        "rope_type": LISTED,
        "short_factor": held,
        "long_factor": held,
        "attention_factor": 1.0,
        "original_max_position_embeddings": config.max_position_embeddings,
    }
