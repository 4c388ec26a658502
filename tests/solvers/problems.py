"""Random layers whose inputs are correlated and whose weights have outliers."""

import torch
from torch import Tensor


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
