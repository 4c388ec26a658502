"""AWQ in its "gemm" layout: 4 bits, eight rows in a word."""

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
from qexp.packed.formats.words import pack, unpack

METHOD = "awq"
MARKS = ("qweight", "qzeros", "scales")
PARTS = MARKS
BITS, EIGHT = 4, 8
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # of the eight rows in a word, from its low end


def refusal(coded: Coded) -> str | None:
    """Why the format cannot hold a matrix."""
    if said := integer_refusal(coded, (BITS,)):
        return said
    if coded.shape[0] % EIGHT:
        return f"model: {coded.shape[0]} outputs of a layer are no multiple of 8, as awq needs"
    return exact_refusal(coded.scales().scale, torch.float16)


def write(coded: Coded) -> dict[str, Tensor]:
    """The tensors of one linear; every zero point is stored, that of symmetric matrices too."""
    scale, zero = rowwise(coded)
    return {
        "qweight": pack(_mixed(coded.codes.T, ORDER), BITS),
        "qzeros": pack(_mixed(zero.int().T, ORDER), BITS),
        "scales": scale.T.to(torch.float16).contiguous(),
    }


def config(matrices: Mapping[str, Coded], floats: Sequence[str]) -> dict[str, Any]:
    """`quantization_config`, of matrices with one grid. floats: the other linears of the model."""
    coded = next(iter(matrices.values()))
    return {
        "quant_method": METHOD,
        "bits": BITS,
        "group_size": coded.grid.group_size or -1,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": list(floats),
    }


def read(tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str) -> Coded:
    """The stored form of one linear."""
    version = str(config.get("version", "gemm")).lower()
    if version != "gemm":
        raise Unreadable(f"has the version {version}; gemm can be read")
    qweight, scales = part(tensors, "qweight"), part(tensors, "scales")
    columns, (groups, rows) = len(qweight), scales.shape
    shaped(tensors, "qweight", (columns, rows // EIGHT))
    qzeros = shaped(tensors, "qzeros", (groups, rows // EIGHT))
    back = [ORDER.index(place) for place in range(EIGHT)]
    codes, zero = (_mixed(unpack(each, BITS, rows), back).T for each in (qweight, qzeros))
    fixed = bool((zero == 2 ** (BITS - 1)).all())
    return of_integers(
        BITS, codes.contiguous(), scales.T.contiguous(), None if fixed else zero.contiguous()
    )


def _mixed(values: Tensor, order: Sequence[int]) -> Tensor:
    """Every eight neighbours in another order."""
    lines, count = values.shape
    return values.reshape(lines, count // EIGHT, EIGHT)[:, :, order].reshape(lines, count)
