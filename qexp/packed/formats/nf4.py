"""NF4 of bitsandbytes: blocks of 64 weights of the flattened matrix."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qexp.grid import LevelGrid
from qexp.grid.float_formats import levels
from qexp.packed.coded import Coded
from qexp.packed.formats.checks import Unreadable, part, rowwise, shaped

METHOD = "bitsandbytes"
STATE = "weight.quant_state.bitsandbytes__nf4"
MARKS = ("weight.absmax", STATE)
PARTS = ("weight", *MARKS, "weight.quant_map")
KIND = "nf4"


def refusal(coded: Coded) -> str | None:
    """Why the format cannot hold a matrix."""
    grid = coded.grid
    if not isinstance(grid, LevelGrid) or grid.kind != KIND:
        return "weight: the format holds weight=nf4"
    if grid.signed_scales:
        return "weight.signed_scales=true: the format holds one scale per block"
    if grid.per_tensor or grid.group_size is None or grid.group_size & (grid.group_size - 1):
        return f"weight.group_size={grid.group_size}: the format holds blocks of a power of two"
    return None


def write(coded: Coded) -> dict[str, Tensor]:
    """The tensors of one linear. The first weight of a pair is in the high half of its byte."""
    scale, _ = rowwise(coded)
    codes = coded.codes.reshape(-1, 2).to(torch.uint8)
    rows, columns = coded.shape
    state = {
        "quant_type": KIND,
        "blocksize": columns // scale.shape[1],
        "dtype": "float32",
        "shape": [rows, columns],
    }
    return {
        "weight": ((codes[:, 0] << 4) | codes[:, 1]).reshape(-1, 1),
        "weight.absmax": scale.float().reshape(-1),
        "weight.quant_map": torch.tensor(levels(KIND)),
        STATE: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


def config(matrices: Mapping[str, Coded], floats: Sequence[str]) -> dict[str, Any]:
    """`quantization_config`. floats: the other linears of the model."""
    return {
        "quant_method": METHOD,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": KIND,
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": list(floats),
    }


def read(tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str) -> Coded:
    """The stored form of one linear, without double quantization."""
    try:
        state = json.loads(bytes(part(tensors, STATE).tolist()))
        (rows, columns), size = state["shape"], int(state["blocksize"])
    except (ValueError, KeyError) as error:
        raise Unreadable(f"has no readable {STATE} ({error})") from error
    if state.get("nested_blocksize"):
        raise Unreadable("has scales that are quantized a second time (double quantization)")
    if columns % size:
        raise Unreadable(f"has blocks of {size}, which do not divide its {columns} columns")
    packed = shaped(tensors, "weight", (rows * columns // 2, 1), (rows * columns // 2,))
    scale = shaped(tensors, "weight.absmax", (rows * columns // size,))
    pairs = packed.reshape(-1, 1).int()
    codes = torch.cat([pairs >> 4, pairs & 15], 1).reshape(rows, columns)
    return Coded(LevelGrid(KIND, group_size=size), codes.int(), scale.reshape(rows, -1).float())
