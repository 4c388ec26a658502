"""Packing of codes into 32-bit words, row by row."""

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from qexp.packed.bitpacking import pack_bits, unpack_bits

WORD = 32


def pack(codes: Int[Tensor, "rows count"], bits: int) -> Int[Tensor, "rows words"]:
    """Code i of a row at bit i·bits of the row's little-endian stream, cut into int32 words; the
    last word is padded with zeros."""
    rows, count = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -count % WORD))  # 32 codes fill `bits` words
    stream = pack_bits(padded, bits).numpy().view("<i4").reshape(rows, -1)
    return torch.from_numpy(stream[:, : words(count, bits)].astype(np.int32))


def unpack(packed: Int[Tensor, "rows words"], bits: int, count: int) -> Int[Tensor, "rows count"]:
    """The inverse of `pack` for rows of `count` codes."""
    rows = len(packed)
    whole = -(-count // WORD)
    padded = torch.nn.functional.pad(packed, (0, whole * bits - packed.shape[1]))
    stream = torch.from_numpy(padded.contiguous().numpy().astype("<i4").view(np.uint8).reshape(-1))
    return unpack_bits(stream, bits, (rows, whole * WORD))[:, :count]


def unpack_padded(
    packed: Int[Tensor, "rows words"], bits: int, count: int
) -> Int[Tensor, "rows count"]:
    """Codes of words that hold floor(32 / bits) codes each and leave the rest of the word empty, as
    compressed-tensors wrote before its version 0.18."""
    shifts = torch.arange(0, WORD - bits + 1, bits, dtype=torch.int32)
    codes = (packed[:, :, None] >> shifts) & (2**bits - 1)
    return codes.reshape(len(packed), -1)[:, :count].int()


def words(count: int, bits: int) -> int:
    """The number of words of `count` codes without gaps."""
    return -(-count * bits // WORD)


def padded_words(count: int, bits: int) -> int:
    """The number of words of `count` codes that `unpack_padded` reads."""
    return -(-count // (WORD // bits))
