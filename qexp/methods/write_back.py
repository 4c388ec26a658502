"""Writing a solution or a trained weight into its layer, with a record of its error."""

import logging
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qexp.common import heap, on_disk
from qexp.grid import Grid
from qexp.methods.checks import finite
from qexp.packed.coded import Coded
from qexp.packed.shelved import Shelved
from qexp.quantizers.parametrization import bake, float_weight
from qexp.solvers import Solution
from qexp.solvers.base import error
from qexp.step import Record

log = logging.getLogger(__name__)


def write(
    name: str,
    linear: nn.Linear,
    solution: Solution,
    baseline: Float[Tensor, "rows columns"],
    hessian: Float[Tensor, "..."] | None,
    seconds: float,
    tolerance: float = 1e-3,
    target: Float[Tensor, "rows columns"] | None = None,
    measure: Callable[[Tensor, Tensor | None], float] = error,
) -> Record:
    """Write a solution into its layer after checking it.

    target: the matrix from which errors are measured; None is the layer's weight. measure: the
    objective of the solver.

    Raises RuntimeError naming the layer when the weights are not finite, are not what storage
    gives back, or lie farther from the target than rounding to nearest would leave them, by more
    than a share of `tolerance`.
    """
    weight = linear.weight.detach().float()
    target = weight if target is None else target
    if not solution.weight.isfinite().all():
        raise RuntimeError(f"{name}: the solver returned weights that are not finite")
    if not torch.equal(solution.weight, solution.packed.dequantize()):
        raise RuntimeError(f"{name}: the quantized weights are not those that storage gives back")
    scale = max(measure(weight, hessian), torch.finfo(torch.float32).tiny)
    before = measure(baseline - target, hessian) / scale
    after = measure(solution.weight - target, hessian) / scale
    if after > before * (1 + tolerance) + 1e-7:
        raise RuntimeError(
            f"{name}: the calibrated error {after:.3g} exceeds the {before:.3g} of rounding to "
            "nearest: calibration data or damping do not fit this layer (raise method.solver.damp)"
        )
    if after > before * (1 + 1e-3) + 1e-7:
        log.warning("%s: error %.3g, rounding to nearest %.3g", name, after, before)
    on_disk.assign(linear.weight, solution.weight)
    heap.trim()
    rows, columns = weight.shape
    return Record(
        name,
        rows,
        columns,
        solution.bits,
        before,
        after,
        solution.damp,
        seconds,
        Shelved.of(solution.packed, disk=on_disk.is_mapped(linear.weight)),
        solution.paper_bits,
    )


@torch.no_grad()
def record(name: str, linear: nn.Linear, grid: Grid, seconds: float) -> Record:
    """Bake a trained weight. Errors are shares of that weight, what rounding to nearest would leave
    and what its trained scales leave: what training started from is no measure any more."""
    weight = float_weight(linear).float()
    packed = bake(linear)
    finite(name, linear)
    scale = max(error(weight, None), torch.finfo(torch.float32).tiny)
    before = error(grid(weight) - weight, None) / scale
    # codes of an earlier step are on the host
    after = error(packed.dequantize().to(weight) - weight, None) / scale
    rows, columns = packed.shape
    printed = packed.paper_bits() if isinstance(packed, Coded) else None
    return Record(name, rows, columns, packed.bits(), before, after, 0.0, seconds, packed, printed)
