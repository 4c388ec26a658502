"""LDLQ as QuIP writes it: H = (U + I) D (U + I)ᵀ with U strictly upper, columns from first to last,
each rounded after hearing, through U, of the errors before it. In float64."""

from collections.abc import Callable

import torch
from torch import Tensor


def ldlq(weight: Tensor, hessian: Tensor, nearest: Callable[[Tensor], Tensor]) -> Tensor:
    weight, hessian = weight.double(), hessian.double()
    lower = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)  # upper: H = lower lowerᵀ
    unit = lower / lower.diagonal()
    rounded = torch.zeros_like(weight)
    for column in range(weight.shape[1]):
        errors = weight[:, :column] - rounded[:, :column]
        heard = weight[:, column] + errors @ unit[:column, column]
        rounded[:, column] = nearest(heard)
    return rounded
