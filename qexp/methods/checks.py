"""Checks of solvers, Hessians and linears before anything is quantized."""

from collections.abc import Callable

from torch import nn

from qexp.common.errors import UserError
from qexp.hessian import Hessian
from qexp.solvers import Solver
from qexp.task import Task


def check(task: Task, solver_of: Callable[[str], Solver]) -> None:
    """UserError, before any work, when the solver of a linear cannot take its shape."""
    for name, linear in task.linears().items():
        try:
            solver_of(name).check(linear.out_features, linear.in_features)
        except UserError as reason:
            raise UserError(f"{name}: {reason}") from reason


def check_shape(solver: Solver, hessian: Hessian) -> None:
    """UserError when the solver needs products of inputs that the Hessian does not have."""
    if hessian.is_diagonal and not solver.needs_diagonal:
        raise UserError(
            f"method.hessian=diagonal: {type(solver).__name__} needs the products of inputs too; "
            "give method/hessian=layerwise, token or output."
        )


def finite(name: str, linear: nn.Linear) -> None:
    """UserError when a layer's weights hold NaN or infinity."""
    if not linear.weight.isfinite().all():
        raise UserError(
            f"{name}.weight holds values that are not finite: the model's file is damaged, or was "
            "saved from a diverged run; load another one (model.path, model.id)."
        )
