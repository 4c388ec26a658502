"""The Cholesky factor of the damped inverse Hessian, and the order of columns."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Factor(NamedTuple):
    """upper: U with (H + damp·mean(diag H)·I)⁻¹ = Uᵀ U, float32, dead columns given diagonal 1.
    dead: inputs never seen, whose weights GPTQ sets to 0."""

    upper: Float[Tensor, "columns columns"]
    dead: Bool[Tensor, " columns"]
    damp: float


class Ordered(NamedTuple):
    """A matrix as the sweep takes its columns. weight: in that order, 0 for unseen inputs.
    order: which column comes when; place: when each column comes."""

    weight: Float[Tensor, "rows columns"]
    factor: Factor
    order: Int[Tensor, " columns"]
    place: Int[Tensor, " columns"]


class NotPositiveDefinite(ValueError):
    """A Hessian that no damping up to ten times its mean diagonal makes factorable, or one that
    holds NaN or infinity."""


def damped(
    hessian: Float[Tensor, "columns columns"], damp: float
) -> Float[Tensor, "columns columns"]:
    """H with 1 on the diagonal of unseen inputs and `damp` times its mean added to all."""
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damp * diagonal.mean()
    return hessian


def inverse_factor(hessian: Float[Tensor, "columns columns"], damp: float) -> Factor:
    """Factor the damped inverse. When float32 fails, float64; then ten times the damping.

    Reversing rows and columns turns the lower factor of H into an upper one, R with H = R Rᵀ, and
    U = R⁻¹: one factorization and one triangular inverse, and no explicit H⁻¹.
    """
    if not hessian.isfinite().all():
        raise NotPositiveDefinite("its entries are not all finite")
    dead = hessian.diagonal() == 0
    tried = damp
    while True:
        for dtype in (torch.float32, torch.float64):
            matrix = damped(hessian, tried).to(dtype).flip(0, 1)
            lower, failed = torch.linalg.cholesky_ex(matrix)
            if failed == 0:
                eye = torch.eye(len(matrix), dtype=dtype, device=matrix.device)
                upper = torch.linalg.solve_triangular(lower, eye, upper=False).flip(0, 1).float()
                if upper.isfinite().all():
                    return Factor(upper, dead, tried)
        tried = max(10 * tried, 1e-4)
        if tried > 10:
            raise NotPositiveDefinite("it is not positive definite even with damping 10")


def ordered(
    weight: Float[Tensor, "rows columns"],
    hessian: Float[Tensor, "columns columns"],
    damp: float,
    act_order: bool,
    backwards: bool = False,
) -> Ordered:
    """Columns as they stand or, with `act_order`, by descending diagonal of the Hessian;
    `backwards`: the last of them first."""
    order = torch.arange(weight.shape[1], device=weight.device)
    if act_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    order = order.flip(0) if backwards else order
    factor = inverse_factor(hessian[order][:, order], damp)
    weight = weight.float()[:, order].masked_fill(factor.dead, 0)
    return Ordered(weight, factor, order, torch.argsort(order))
