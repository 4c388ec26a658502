"""Optimal Brain Quantization with an explicit inverse: slow, and as its derivation reads."""

from collections.abc import Callable

import torch
from torch import Tensor


def obq(
    weight: Tensor, hessian: Tensor, damp: float, round_column: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """Columns in turn: round one, move the rest by -(w - q) / [H⁻¹]_jj · [H⁻¹]_j:, drop the column
    from H and invert what is left (GPTQ's equations 1 to 3, no Cholesky factor). In float64."""
    weight, hessian = weight.double().clone(), hessian.double().clone()
    rounded = torch.zeros_like(weight)
    hessian.diagonal().add_(damp * hessian.diagonal().mean())
    for column in range(weight.shape[1]):
        inverse = torch.linalg.inv(hessian[column:, column:])
        values = weight[:, column].clone()
        rounded[:, column] = round_column(values, column)
        step = (values - rounded[:, column]) / inverse[0, 0]
        weight[:, column:] -= step[:, None] * inverse[0]
    return rounded
