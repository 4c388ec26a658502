"""Whole numbers of a few bits, one after another in a byte string."""

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor


def pack_bits(codes: Int[Tensor, "*shape"], bits: int) -> Tensor:
    """Codes of `bits` bits, one after another in a byte string (the last byte filled up)."""
    flat = codes.reshape(-1).cpu().numpy().astype(np.uint32)
    each = (flat[:, None] >> np.arange(bits, dtype=np.uint32)) & 1
    return torch.from_numpy(np.packbits(each.astype(np.uint8).reshape(-1), bitorder="little"))


def unpack_bits(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Int[Tensor, "..."]:
    """The inverse of `pack_bits`."""
    count = int(np.prod(shape))
    each = np.unpackbits(packed.cpu().numpy(), count=count * bits, bitorder="little")
    weights = (1 << np.arange(bits)).astype(np.int64)
    return torch.from_numpy((each.reshape(count, bits) * weights).sum(1).reshape(shape))
