"""GGUF's block types Q4_0, Q5_0 and Q8_0: 32 signed codes with a float16 scale."""

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from qexp.packed.coded import Coded
from qexp.packed.formats.checks import (
    Unreadable,
    exact_refusal,
    integer_refusal,
    of_integers,
    rowwise,
)

BLOCK = 32
# type → bits of a code, bytes of a block
TYPES = {"Q4_0": (4, 18), "Q5_0": (5, 22), "Q8_0": (8, 34)}


def refusal(coded: Coded) -> str | None:
    """Why no block type holds a matrix exactly."""
    if said := integer_refusal(coded, tuple(range(2, 9))):
        return said
    columns = coded.shape[1]
    size = columns // coded.scales().scale.shape[1]
    if size % BLOCK:
        return f"weight.group_size={size}: the format holds groups of 32 inputs or a multiple"
    if said := exact_refusal(coded.scales().scale, torch.float16):
        return said
    if container(coded) is None:
        return "weight.bits=8 with weight.symmetric=false: code - zero needs nine bits"
    return None


def container(coded: Coded) -> str | None:
    """The smallest block type that holds every code - zero of the grid; None where there is none.

    Zero points are whole, so an asymmetric grid of b bits is part of a symmetric one of b + 1.
    """
    bits = coded.grid.bits
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if coded.zero is not None:
        zero = coded.scales().zero
        low, high = -max(int(zero.max()), -low), max(coded.grid.top - int(zero.min()), high)
    for name, (width, _) in TYPES.items():
        if low >= -(2 ** (width - 1)) and high < 2 ** (width - 1):
            return name
    return None


def write(coded: Coded, name: str | None = None) -> tuple[str, UInt8[Tensor, "rows bytes"]]:
    """The block type and the bytes of every row. name: a block type that holds the codes; None is
    the smallest."""
    name = name or container(coded)
    assert name is not None, "refusal says so before"
    bits, size = TYPES[name]
    rows = len(coded.codes)
    scale, _ = rowwise(coded)
    wide = coded.per_column()
    signed = (coded.codes - wide.zero.int()).reshape(rows, -1, BLOCK)
    blocks = signed.shape[1]
    scales = scale.repeat_interleave(blocks // scale.shape[1], 1).to(torch.float16)
    parts = [scales[..., None].contiguous().view(torch.uint8)]
    if bits == 8:
        parts.append(signed.to(torch.int8).view(torch.uint8))
    else:
        unsigned = signed + 2 ** (bits - 1)
        if bits == 5:
            places = torch.arange(BLOCK)
            high = ((unsigned >> 4).long() << places).sum(-1, keepdim=True)
            parts.append(torch.from_numpy(high.numpy().astype("<u4").view(np.uint8)))
        low = (unsigned & 15).to(torch.uint8)
        parts.append(low[..., :16] | (low[..., 16:] << 4))
    return name, torch.cat(parts, -1).reshape(rows, blocks * size)


def read(name: str, stored: UInt8[Tensor, "rows bytes"]) -> Coded:
    """The stored form of the bytes of a matrix. Unreadable for other block types."""
    if name not in TYPES:
        raise Unreadable(f"has the type {name}; {', '.join(TYPES)} can be read")
    bits, size = TYPES[name]
    rows, count = stored.shape
    if count % size:
        raise Unreadable(f"has rows of {count} bytes, which no whole blocks of {size} fill")
    blocks = stored.reshape(rows, -1, size)
    scale = blocks[..., :2].contiguous().view(torch.float16)[..., 0]
    if bits == 8:
        codes = blocks[..., 2:].contiguous().view(torch.int8).int() + 128
    else:
        nibbles = blocks[..., -16:].int()
        codes = torch.cat([nibbles & 15, nibbles >> 4], -1)
        if bits == 5:
            high = torch.from_numpy(blocks[..., 2:6].contiguous().numpy().view("<u4").astype("i8"))
            codes = codes + (((high >> torch.arange(BLOCK)) & 1) << 4).int()
    return of_integers(bits, codes.reshape(rows, -1), scale, None)
