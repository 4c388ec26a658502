"""Cholesky factor of the damped inverse Hessian, and the order of columns."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qexp.common import heap


class Factor(NamedTuple):
    """upper: U with (H + damp·mean(diag H)·I)⁻¹ = Uᵀ U; dead columns have diagonal 1 in H.
    dead: inputs that were always 0, whose weights GPTQ sets to 0. damp: the damping that was used.
    """

    upper: Float[Tensor, "columns columns"]
    dead: Bool[Tensor, " columns"]
    damp: float


class Ordered(NamedTuple):
    """A matrix in the column order of the sweep. weight: in that order, 0 in dead columns.
    order: the column at each position; place: the position of each column."""

    weight: Float[Tensor, "rows columns"]
    factor: Factor
    order: Int[Tensor, " columns"]
    place: Int[Tensor, " columns"]


class NotPositiveDefinite(ValueError):
    """A Hessian that has no Cholesky factor even with a damping of ten times its mean diagonal, or
    that contains NaN or infinity."""


def damped(
    hessian: Float[Tensor, "columns columns"], damp: float
) -> Float[Tensor, "columns columns"]:
    """H with diagonal 1 for dead inputs, plus `damp` times the mean diagonal on the diagonal."""
    return _damp(hessian.clone(), damp)


def _damp(hessian: Float[Tensor, "columns columns"], damp: float) -> Tensor:
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damp * diagonal.mean()
    return hessian


def inverse_factor(
    hessian: Float[Tensor, "columns columns"],
    damp: float,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64),
    order: Int[Tensor, " columns"] | None = None,
) -> Factor:
    """Factor the damped inverse Hessian: in float32, else float64, else with ten times the damping.

    dtypes: tried in turn; the factor is returned in the first. order: of the columns in the factor;
    None: as in H. Given here, no matrix in that order has to be held by the caller.
    Raises NotPositiveDefinite when all fail. Reversing rows and columns turns the lower factor of H
    into an upper one, R with H = R Rᵀ, and U = R⁻¹: one factorization, one
    triangular inverse and no explicit H⁻¹.
    """
    if not hessian.isfinite().all():
        raise NotPositiveDefinite("its entries are not all finite")
    dead = hessian.diagonal() == 0
    if order is not None:
        dead = dead[order]
    current = damp
    while True:
        for dtype in dtypes:
            # Each step gives up the matrix before it: they are the largest of a whole run.
            own = hessian.clone() if order is None else hessian[order][:, order]
            own = _damp(own, current).to(dtype).flip(0, 1)
            lower, failed = torch.linalg.cholesky_ex(own)
            del own
            if failed == 0:
                eye = torch.eye(len(lower), dtype=dtype, device=lower.device)
                upper = torch.linalg.solve_triangular(lower, eye, upper=False)
                del lower, eye
                upper = upper.flip(0, 1).to(dtypes[0])
                if upper.isfinite().all():
                    return Factor(upper, dead, current)
        current = max(10 * current, 1e-4)
        if current > 10:
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
    moved = act_order or backwards
    factor = inverse_factor(hessian, damp, order=order if moved else None)
    heap.trim()  # of the matrices as large as H that it took
    weight = weight.float()[:, order].masked_fill(factor.dead, 0)
    return Ordered(weight, factor, order, torch.argsort(order))
