"""Importance of single weights in a Hessian, by which range estimators weigh their errors."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from qexp.common.errors import check_choice

# Of [rows, size] values w, given diag H and diag U (H⁻¹ = Uᵀ U) of their columns.
IMPORTANCES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "diagonal": lambda w, h, u: h.expand_as(w),
    "obs": lambda w, h, u: (w / u).square(),
}
LEAST = (
    1e-9  # of the mean: an estimator leaves out values without importance, and some must be left
)

# (values [rows, size], index of their first column) → their importance.
Importance = Callable[[Tensor, int], Tensor | None]


def importance_of(
    kind: str | None, hessian: Float[Tensor, " columns"], factor: Float[Tensor, " columns"]
) -> Importance:
    """The importance of a matrix' weights, with mean 1; None without a `kind`.

    "diagonal": H_jj, the error of a weight while the others are fixed. "obs": w² / U_jj², what it
    would cost to set the weight to 0 and compensate for it (OBS; SpQR's and SliM-LLM's saliency).

    hessian, factor: the diagonals of H and of U, in the order of the matrix' columns.
    """
    if kind is None:
        return lambda values, first: None
    measure = IMPORTANCES[kind]

    def importance(values: Tensor, first: int) -> Tensor:
        columns = slice(first, first + values.shape[1])
        found = measure(values, hessian[columns], factor[columns])
        mean = found.mean()
        return (found / mean.where(mean > 0, 1)).clamp(min=LEAST)

    return importance


def check_importance(settings: object) -> None:
    """UserError unless `importance` of a solver's settings is null or a known one."""
    if getattr(settings, "importance", None) is not None:
        check_choice("method.solver", settings, importance=IMPORTANCES)
