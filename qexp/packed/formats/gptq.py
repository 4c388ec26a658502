"""GPTQ: the format of AutoGPTQ and GPTQModel."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qexp.packed.coded import Coded
from qexp.packed.formats.checks import (
    Unreadable,
    exact_refusal,
    integer_refusal,
    of_integers,
    part,
    rowwise,
    shaped,
)
from qexp.packed.formats.words import WORD, pack, unpack

METHOD = "gptq"
MARKS = ("qweight", "qzeros", "scales")
PARTS = (*MARKS, "g_idx")
BITS = (2, 3, 4, 8)
V1, V2 = "gptq", "gptq_v2"  # v1 stores zero - 1


def refusal(coded: Coded) -> str | None:
    """Why the format cannot hold a matrix."""
    if said := integer_refusal(coded, BITS, group=True):
        return said
    bits = coded.grid.bits
    for side, count in zip(("outputs", "inputs"), coded.shape, strict=True):
        if count * bits % WORD:
            return (
                f"weight.bits={bits}: {count} {side} of a layer do not fill whole 32-bit words, as "
                "the format needs"
            )
    return exact_refusal(coded.scales().scale, torch.float16)


def write(coded: Coded) -> dict[str, Tensor]:
    """The tensors of one linear: everything transposed; v1 for symmetric matrices, else v2."""
    bits, columns = coded.grid.bits, coded.shape[1]
    scale, zero = rowwise(coded)
    groups = scale.shape[1]
    offset = 1 if coded.zero is None else 0
    index = torch.arange(columns) // (columns // groups) if coded.group is None else coded.group
    return {
        "qweight": pack(coded.codes, bits).T.contiguous(),
        "qzeros": pack(zero.int().T - offset, bits),
        "scales": scale.T.to(torch.float16).contiguous(),
        "g_idx": index.int(),
    }


def config(matrices: Mapping[str, Coded], floats: Sequence[str]) -> dict[str, Any]:
    """`quantization_config`, of matrices with one grid. floats: the other linears of the model."""
    coded = next(iter(matrices.values()))
    symmetric = all(each.zero is None for each in matrices.values())
    blocks = list(dict.fromkeys(inner(name) for name in matrices))
    settings: dict[str, Any] = {
        "quant_method": METHOD,
        "bits": coded.grid.bits,
        "group_size": coded.grid.group_size or -1,
        "desc_act": any(each.group is not None for each in matrices.values()),
        "sym": symmetric,
        "lm_head": False,
        "true_sequential": True,
        "damp_percent": 0.01,
        "static_groups": False,
        "checkpoint_format": V1 if symmetric else V2,
        "meta": {"quantizer": ["qexp"]},
    }
    if any(inner(name) != name for name in floats):  # some of the blocks are float
        settings["modules_in_block_to_quantize"] = [[name] for name in blocks]
    return settings


def inner(name: str) -> str:
    """The part of a linear's name after the number of its block; the whole of one outside."""
    parts = name.split(".")
    last = max((at for at, each in enumerate(parts) if each.isdigit()), default=-1)
    return ".".join(parts[last + 1 :])


def read(tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str) -> Coded:
    """The stored form of one linear, of v1 and v2. Bits are those of the tensors, which may differ
    between linears."""
    version = config.get("checkpoint_format", V1)
    if version not in (V1, V2):
        raise Unreadable(f"has the checkpoint_format {version}; {V1} and {V2} can be read")
    qweight, scales = part(tensors, "qweight"), part(tensors, "scales")
    groups, rows = scales.shape
    if "g_idx" in tensors and len(tensors["g_idx"]):
        columns = len(tensors["g_idx"])
    else:
        columns = qweight.shape[0] * WORD // int(config["bits"])
    bits = qweight.shape[0] * WORD // columns
    if bits not in BITS:
        raise Unreadable(f"has {bits} bits a weight; {', '.join(map(str, BITS))} can be read")
    shaped(tensors, "qweight", (columns * bits // WORD, rows))
    qzeros = shaped(tensors, "qzeros", (groups, rows * bits // WORD))
    codes = unpack(qweight.T.contiguous(), bits, columns)
    offset = 1 if version == V1 else 0
    zero = ((unpack(qzeros, bits, rows) + offset) & (2**bits - 1)).T.contiguous()
    fixed = bool((zero == 2 ** (bits - 1)).all())  # then they need not be stored
    return of_integers(
        bits, codes, scales.T.contiguous(), None if fixed else zero, _index(tensors, groups)
    )


def _index(tensors: Mapping[str, Tensor], groups: int) -> Tensor | None:
    """The group of each column; None where groups are neighbours."""
    index = tensors.get("g_idx")
    if index is None or not len(index):
        return None
    columns = len(index)
    if columns % groups == 0:
        neighbours = torch.arange(columns) // (columns // groups)
        if torch.equal(index.long(), neighbours):
            return None
    return index.long()
