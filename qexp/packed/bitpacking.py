"""Packing of integer codes into bytes."""

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

SLICE = 2**18  # codes at a time, whose 64-bit numbers stay in the processor's cache; whole bytes
POWERS = np.array([1, 3, 9, 27, 81], dtype=np.uint8)


def pack_bits(codes: Int[Tensor, "*shape"], bits: int) -> Tensor:
    """Codes of `bits` bits, packed without gaps into uint8 [bytes]; the last byte is padded."""
    flat = codes.reshape(-1).cpu().numpy()
    packed = np.empty(-(-len(flat) * bits // 8), dtype=np.uint8)
    for start in range(0, len(flat), SLICE):
        part = _packed(flat[start : start + SLICE], bits)
        packed[start * bits // 8 :][: len(part)] = part
    return torch.from_numpy(packed)


def unpack_bits(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Int[Tensor, "..."]:
    """The inverse of `pack_bits`, int32."""
    stored = packed.cpu().numpy()
    codes = np.empty(int(np.prod(shape)), dtype=np.int32)
    for start in range(0, len(codes), SLICE):
        part = codes[start : start + SLICE]
        part[:] = _unpacked(stored[start * bits // 8 :], bits, len(part))
    return torch.from_numpy(codes.reshape(shape))


def _packed(flat: np.ndarray, bits: int) -> np.ndarray:
    if bits > 8:
        each = (flat.astype(np.uint32)[:, None] >> np.arange(bits, dtype=np.uint32)) & 1
        return np.packbits(each.astype(np.uint8).reshape(-1), bitorder="little")
    # Eight codes fill exactly `bits` bytes, and fit into one 64-bit integer.
    eights = np.zeros((-(-len(flat) // 8), 8), dtype=np.uint8)
    eights.reshape(-1)[: len(flat)] = flat
    numbers = np.zeros(len(eights), dtype="<u8")
    for place in range(8):
        numbers |= eights[:, place].astype("<u8") << np.uint64(place * bits)
    size = -(-len(flat) * bits // 8)
    return numbers.view(np.uint8).reshape(-1, 8)[:, :bits].reshape(-1)[:size]


def _unpacked(stored: np.ndarray, bits: int, count: int) -> np.ndarray:
    stored = stored[: -(-count * bits // 8)]
    if bits > 8:
        each = np.unpackbits(stored, count=count * bits, bitorder="little")
        weights = (1 << np.arange(bits)).astype(np.int64)
        return (each.reshape(count, bits) * weights).sum(1)
    filled = np.zeros(-(-count // 8) * bits, dtype=np.uint8)
    filled[: len(stored)] = stored
    eights = np.zeros((len(filled) // bits, 8), dtype=np.uint8)
    eights[:, :bits] = filled.reshape(-1, bits)
    numbers = eights.view("<u8")
    codes = (numbers >> np.arange(0, 8 * bits, bits, dtype=np.uint64)) & np.uint64(2**bits - 1)
    return codes.reshape(-1)[:count]


def pack_trits(codes: Int[Tensor, "*shape"]) -> Tensor:
    """Codes 0, 1 and 2, five to a byte, in uint8 [bytes]; the last byte is padded."""
    flat = codes.reshape(-1).cpu().numpy().astype(np.uint8)
    fives = np.zeros((-(-len(flat) // 5), 5), dtype=np.uint8)
    fives.reshape(-1)[: len(flat)] = flat
    return torch.from_numpy((fives * POWERS).sum(1, dtype=np.uint8))


def unpack_trits(packed: Tensor, shape: tuple[int, ...]) -> Int[Tensor, "..."]:
    """The inverse of `pack_trits`."""
    codes = packed.cpu().numpy()[:, None] // POWERS % 3
    return torch.from_numpy(
        codes.astype(np.int64).reshape(-1)[: int(np.prod(shape))].reshape(shape)
    )
