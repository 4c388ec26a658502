"""MLX: affine quantization of Apple's mlx-lm, value = scale · code + bias."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qexp.packed.coded import Coded
from qexp.packed.formats.checks import (
    Unreadable,
    integer_refusal,
    of_integers,
    part,
    rowwise,
    shaped,
)
from qexp.packed.formats.words import WORD, pack, unpack

METHOD = "mlx"
MARKS = ("scales", "biases")
PARTS = ("weight", *MARKS)
BITS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)


def refusal(coded: Coded) -> str | None:
    """Why the format cannot hold a matrix."""
    if said := integer_refusal(coded, BITS):
        return said
    size = coded.grid.group_size
    if size not in GROUPS:
        return f"weight.group_size={size}: the format holds groups of {GROUPS}"
    return None


def write(coded: Coded) -> dict[str, Tensor]:
    """The tensors of one linear. Biases are float32: -scale · zero in float16 would be rounded."""
    scale, zero = rowwise(coded)
    return {
        "weight": pack(coded.codes, coded.grid.bits).view(torch.uint32),
        "scales": scale.float(),
        "biases": -scale.float() * zero,
    }


def config(matrices: Mapping[str, Coded], floats: Sequence[str]) -> dict[str, Any]:
    """`quantization`, of matrices with one grid; a linear without scales stays float by itself."""
    coded = next(iter(matrices.values()))
    return {"group_size": coded.grid.group_size, "bits": coded.grid.bits, "mode": "affine"}


def read(tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str) -> Coded:
    """The stored form of one linear: zero points are -bias / scale, rounded. Unreadable where that
    is no code, since the minimum is then no multiple of the scale."""
    bits = int(config["bits"])
    packed, scale = part(tensors, "weight"), part(tensors, "scales")
    rows, groups = scale.shape
    columns = groups * int(config["group_size"])
    shaped(tensors, "weight", (rows, columns * bits // WORD))
    biases = shaped(tensors, "biases", (rows, groups)).float()
    zero = (-biases / scale.float()).round()
    if not torch.equal(-scale.float() * zero, biases):
        raise Unreadable("has biases that are no multiples of their scales")
    codes = unpack(packed.view(torch.int32), bits, columns)
    fixed = bool((zero == 2 ** (bits - 1)).all())
    return of_integers(bits, codes, scale, None if fixed else zero)
