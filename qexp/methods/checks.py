"""Checks of solvers, linears and models before anything is quantized or trained."""

from collections.abc import Callable

import torch
from torch import nn

from qexp.common import on_disk
from qexp.common.errors import UserError
from qexp.grid import Grid
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


def check_trainable(task: Task, grid: Grid | None) -> None:
    """UserError, before any work, for a model that cannot be trained, or not with this grid."""
    if next(task.blocks.parameters()).device != task.device:
        raise UserError(
            "offload: training needs the whole model on its device; give offload=false "
            "(trainer.recompute=true saves memory)."
        )
    if any(map(on_disk.is_mapped, task.model.parameters())):
        raise UserError("model.load=stream: training needs the whole model; say model.load=whole.")
    for name, parameter in task.model.named_parameters():
        if parameter.dtype != torch.float32:
            raise UserError(
                f"model.dtype: {name} is {parameter.dtype}, too coarse to train; load the "
                "model in float32 and let trainer.precision=bf16-mixed save time."
            )
        if not parameter.isfinite().all():
            raise UserError(f"{name} holds values that are not finite; load another model.")
    if grid is None:
        return
    for name, linear in task.linears().items():
        try:
            grid.check(linear.out_features, linear.in_features)
        except UserError as reason:
            raise UserError(f"{name}: {reason}") from reason
