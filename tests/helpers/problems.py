"""Random layers whose inputs are correlated and whose weights have outliers."""

import torch
from torch import Tensor

from qexp.grid import IntGrid
from qexp.solvers import Solution

# SpQR's two levels.
SECOND = IntGrid(3, group_size=16, include_zero=False, real_zero=True, scale_dtype="float16")
TWO_LEVELS = IntGrid(
    3,
    group_size=16,
    include_zero=False,
    real_zero=True,
    scale_dtype="float16",
    scales=SECOND,
    zeros=SECOND,
)


def problem(rows: int = 48, columns: int = 96, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight[torch.rand(rows, columns, generator=generator) < 0.01] *= 6
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(4 * columns, columns, generator=generator) @ (mixing + torch.eye(columns))
    return weight, 2 / len(inputs) * inputs.T @ inputs


def loss(change: Tensor, hessian: Tensor) -> float:
    change = change.double()
    return float(torch.trace(change @ hessian.double() @ change.T))


def is_stored_whole(solution: Solution) -> bool:
    """Whether storage gives the weights back bit for bit, and takes as many bits as it says (and
    the filling of last bytes)."""
    packed = solution.packed
    tensors = packed.stored()
    stored = sum(8 * t.numel() * t.element_size() for t in tensors.values())
    restored = type(packed).restore(tensors, packed.layout())
    return (
        torch.equal(solution.weight, packed.dequantize())
        and torch.equal(solution.weight, restored.dequantize())
        and packed.size() <= stored < packed.size() + 8 * len(tensors)
        and solution.bits == packed.size() / solution.weight.numel()
    )
