"""Checks of solvers and linears before anything is quantized."""

from collections.abc import Callable

from torch import nn

from qexp.common.errors import UserError
from qexp.solvers import Solver
from qexp.task import Task


def check(task: Task, solver_of: Callable[[str], Solver]) -> None:
    """UserError, before any work, when the solver of a linear cannot take its shape."""
    for name, linear in task.linears().items():
        try:
            solver_of(name).check(linear.out_features, linear.in_features)
        except UserError as reason:
            raise UserError(f"{name}: {reason}") from reason


def finite(name: str, linear: nn.Linear) -> None:
    """UserError when a layer's weights hold NaN or infinity."""
    if not linear.weight.isfinite().all():
        raise UserError(
            f"{name}.weight holds values that are not finite: the model's file is damaged, or was "
            "saved from a diverged run; load another one (model.path, model.id)."
        )
