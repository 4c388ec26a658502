"""compressed-tensors: the format of llm-compressor, read by transformers, vLLM and SGLang."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qexp.grid import LevelGrid
from qexp.grid.float_formats import levels
from qexp.packed.coded import Coded
from qexp.packed.formats.checks import (
    Unreadable,
    integer_refusal,
    of_integers,
    part,
    rowwise,
    shaped,
)
from qexp.packed.formats.words import pack, padded_words, unpack, unpack_padded, words

METHOD = "compressed-tensors"
MARKS = ("weight_packed", "weight_scale")
INPUTS = ("input_scale", "input_zero_point")
PARTS = (*MARKS, "weight", "weight_zero_point", "weight_shape", "weight_g_idx", *INPUTS)
PACKED, INTEGER, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
FORMATS = (PACKED, INTEGER, "naive-quantized", FLOAT)
E4M3 = "e4m3"


def refusal(coded: Coded) -> str | None:
    """Why the format cannot hold a matrix: integers of 2 to 8 bits and e4m3 by rows fit."""
    if isinstance(coded.grid, LevelGrid):
        if coded.grid.kind != E4M3 or coded.grid.group_size is not None:
            return f"weight.kind={coded.grid.kind}: the format holds e4m3 with one scale per row"
        return None
    return integer_refusal(coded, tuple(range(2, 9)))


def layout(coded: Coded, inputs: Mapping[str, Any] | None = None) -> str:
    """The name of the layout of one matrix, given the scheme of its inputs."""
    if isinstance(coded.grid, LevelGrid):
        return FLOAT
    by_rows = coded.grid.bits == 8 and coded.zero is None and coded.grid.group_size is None
    return INTEGER if inputs is not None and by_rows else PACKED


def write(coded: Coded, inputs: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """The tensors of one linear. Scales are float32: a reader multiplies in their type. inputs:
    `input_activations`, on which the layout depends."""
    scale, zero = rowwise(coded)
    scale, form = scale.float(), layout(coded, inputs)
    if form == FLOAT:
        values = torch.tensor(levels(E4M3))[coded.codes.long()].to(torch.float8_e4m3fn)
        return {"weight": values, "weight_scale": scale}
    bits = coded.grid.bits
    if form == INTEGER:
        return {"weight": (coded.codes - 2 ** (bits - 1)).to(torch.int8), "weight_scale": scale}
    tensors = {
        "weight_packed": pack(coded.codes, bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(coded.shape),
    }
    if coded.zero is not None:
        tensors["weight_zero_point"] = pack(zero.int().T, bits).T.contiguous()
    return tensors


def scheme(coded: Coded, inputs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config group of one matrix, without its targets. inputs: `input_activations`."""
    size = coded.grid.group_size  # also where a row is one group: linears then share a config group
    weights = {
        "num_bits": coded.grid.bits,
        "type": "float" if isinstance(coded.grid, LevelGrid) else "int",
        "symmetric": coded.zero is None,
        "dynamic": False,
        "strategy": "channel" if size is None else "group",
    }
    if size is not None:
        weights["group_size"] = size
    return {
        "weights": weights,
        "input_activations": None if inputs is None else dict(inputs),
        "output_activations": None,
        "format": layout(coded, inputs),
    }


def config(
    matrices: Mapping[str, Coded], floats: Sequence[str], inputs: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """`quantization_config`. floats: the other linears of the model, tied heads among them, which
    a reader would otherwise expect to be quantized."""
    found: list[tuple[dict[str, Any], list[str]]] = []
    for name, coded in matrices.items():
        own = scheme(coded, inputs)
        known = next((names for each, names in found if each == own), None)
        if known is None:
            found.append((own, [name]))
        else:
            known.append(name)
    groups = {
        f"group_{index}": {"targets": names if len(found) > 1 else ["Linear"], **own}
        for index, (own, names) in enumerate(found)
    }
    forms = {own["format"] for own, _ in found}
    return {
        "quant_method": METHOD,
        "format": forms.pop() if len(forms) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(floats),
        "kv_cache_scheme": None,
    }


def group_of(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The config group of a linear: one that names it, else that of the class. Unreadable where
    there is none."""
    groups: list[dict[str, Any]] = list(config.get("config_groups", {}).values())
    for wanted in (lambda target: _named(target, name), lambda target: target == "Linear"):
        for group in groups:
            if any(wanted(target) for target in group.get("targets", [])):
                return group
    raise Unreadable("is a target of none of quantization_config.config_groups")


def read(tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str) -> Coded:
    """The stored form of one linear; dense words and the padded ones of versions before 0.18."""
    group = group_of(config, name)
    form = group.get("format") or config.get("format")
    if form not in FORMATS:
        raise Unreadable(f"has the format {form}; {', '.join(FORMATS)} can be read")
    weights = group["weights"]
    bits, strategy = int(weights["num_bits"]), weights.get("strategy")
    if strategy not in ("group", "channel", "tensor"):
        raise Unreadable(f"has the strategy {strategy}; group, channel and tensor can be read")
    if weights.get("type", "int") == "float":
        return _of_floats(tensors, bits)
    if form != PACKED:
        codes = part(tensors, "weight").int() + 2 ** (bits - 1)
        rows, columns = codes.shape
    else:
        rows, columns = (int(side) for side in shaped(tensors, "weight_shape", (2,)))
        dense, padded = words(columns, bits), padded_words(columns, bits)
        packed = shaped(tensors, "weight_packed", (rows, dense), (rows, padded))
        reader = unpack if packed.shape[1] == dense else unpack_padded
        codes = reader(packed, bits, columns)
    scale = _scale(tensors, rows)
    zero = None if weights.get("symmetric", True) else _zero(tensors, bits, rows, scale.shape[1])
    index = tensors.get("weight_g_idx")
    return of_integers(bits, codes, scale, zero, None if index is None else index.long())


def _named(target: str, name: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return target == name


def _scale(tensors: Mapping[str, Tensor], rows: int) -> Tensor:
    scale = part(tensors, "weight_scale")
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(rows, 1)
    if scale.ndim != 2 or len(scale) != rows:
        raise Unreadable(f"weight_scale has the shape {list(scale.shape)}, not [{rows}, groups]")
    return scale


def _zero(tensors: Mapping[str, Tensor], bits: int, rows: int, groups: int) -> Tensor:
    dense, padded = words(rows, bits), padded_words(rows, bits)
    stored = part(tensors, "weight_zero_point")
    if stored.dtype == torch.int8 and stored.numel() in (1, rows * groups):  # signed, not packed
        signed = stored.int() + 2 ** (bits - 1)
        return signed.reshape(-1, groups).expand(rows, groups)
    stored = shaped(tensors, "weight_zero_point", (dense, groups), (padded, groups)).T
    reader = unpack if stored.shape[1] == dense else unpack_padded
    return reader(stored.contiguous(), bits, rows).T.contiguous()


def _of_floats(tensors: Mapping[str, Tensor], bits: int) -> Coded:
    values = part(tensors, "weight")
    if values.dtype != torch.float8_e4m3fn:
        raise Unreadable(f"has {bits}-bit floats of {values.dtype}; float8_e4m3fn can be read")
    table = torch.tensor(levels(E4M3))
    codes = torch.searchsorted(table, values.float().contiguous()).clamp(max=len(table) - 1)
    if not torch.equal(table[codes], values.float()):
        raise Unreadable("has float8 values that are not numbers")
    scale = _scale(tensors, len(values))
    if scale.shape[1] != 1:
        raise Unreadable(f"has {scale.shape[1]} scales a row for float8; one can be read")
    dtype = str(scale.dtype).removeprefix("torch.")
    return Coded(LevelGrid(E4M3, scale_dtype=dtype), codes.int(), scale.float())
