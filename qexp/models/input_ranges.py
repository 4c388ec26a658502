"""Quantized inputs of linears in compressed-tensors: written from a run, and read."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qexp.common.errors import UserError
from qexp.grid import IntGrid
from qexp.packed.formats.compressed_tensors import INPUTS
from qexp.quantizers.placement import LinearInputs
from qexp.quantizers.scheme import (
    Activations,
    FloatActivations,
    QuantizedActivations,
    attach,
)
from qexp.task import Task

SCALE, ZERO = INPUTS
BITS, MIDDLE = 8, 128


class Inputs(NamedTuple):
    """Quantized inputs of all linears of the blocks."""

    scheme: dict[str, Any]  # `input_activations`
    tensors: dict[str, dict[str, Tensor]]  # of static ones, by linear


def of_task(task: Task, kinds: Sequence[Activations]) -> Inputs | None:
    """The inputs of a model whose quantizers have been attached; None where all are float.
    UserError, with the run's key, for what compressed-tensors cannot hold."""
    found = [kind for kind in kinds if not isinstance(kind, FloatActivations)]
    if not found:
        return None
    refused = (
        "the export holds 8-bit inputs of linears (activation=int8_token or int8_tensor with "
        "activation/placement=linear_inputs and kv=none); leave the others float"
    )
    [kind, *more] = found
    if more or not isinstance(kind, QuantizedActivations):
        raise UserError(f"activation, kv: {refused}")
    if not isinstance(kind.placement, LinearInputs):
        raise UserError(f"activation/placement, kv: {refused}")
    grid = kind.grid
    if not isinstance(grid, IntGrid) or grid.bits != BITS or grid.group_size is not None:
        raise UserError(f"activation.grid: {refused}")
    if kind.dynamic:
        if not grid.symmetric or grid.narrow or grid.per_tensor:
            raise UserError(
                "activation.grid: readers give each token a symmetric scale of max / 127.5; say "
                "symmetric=true narrow=false per_tensor=false"
            )
        return Inputs(_scheme(True, "token", True), {})
    if not grid.per_tensor or grid.real_zero:
        raise UserError("activation.grid: static inputs have one scale and a whole zero point")
    tensors: dict[str, dict[str, Tensor]] = {}
    for site, names in _sites(task).items():
        quantizer = task.quantizers[site]
        scale, zero = (getattr(quantizer, key).detach().reshape(1) for key in ("scale", "zero"))
        own = {SCALE: scale.float()}
        if not grid.symmetric:
            own[ZERO] = (zero.round() - MIDDLE).to(torch.int8)
        tensors |= dict.fromkeys(names, own)
    return Inputs(_scheme(False, "tensor", grid.symmetric), tensors)


def attached(
    schemes: Sequence[Mapping[str, Any] | None],
    stored: Mapping[str, Mapping[str, Tensor]],
    where: str,
) -> Callable[[Task], None]:
    """What attaches the quantizers of a checkpoint to its model. schemes: `input_activations` of
    every config group. UserError for inputs that this project does not round alike."""
    given = [scheme for scheme in schemes if scheme]
    if not given:
        return lambda task: None
    keys = ("num_bits", "type", "symmetric", "dynamic", "strategy")
    kinds = {tuple(scheme.get(key) for key in keys) for scheme in given}
    readable = {
        (BITS, "int", True, True, "token"): True,
        **{(BITS, "int", each, False, "tensor"): False for each in (True, False)},
    }
    if len(kinds) > 1 or len(given) != len(schemes) or (kind := kinds.pop()) not in readable:
        raise UserError(
            f"{where}: quantization_config.input_activations: 8-bit integers for each token, or "
            "with one static scale, in every group can be read"
        )
    dynamic, symmetric = readable[kind], kind[2]
    grid = IntGrid(BITS, symmetric=bool(symmetric), per_tensor=not dynamic)
    scheme = QuantizedActivations(LinearInputs(), grid, dynamic)

    def finish(task: Task) -> None:
        state = {}
        for site, names in _sites(task).items():
            if any(name not in stored for name in names):
                raise UserError(f"{where}: {names[0]} and its neighbours are not all quantized")
            ranges = {_range(stored[name], bool(dynamic), where, name) for name in names}
            if len(ranges) > 1:
                raise UserError(
                    f"{where}: {' and '.join(names)} read one tensor and have different {SCALE}"
                )
            for key, values in zip(("scale", "zero"), ranges.pop(), strict=True):
                state[f"{site}.{key}"] = torch.tensor(values).reshape(-1, 1)
        attach(task, [scheme])
        task.quantizers.load_state_dict(state)

    return finish


Numbers = tuple[tuple[float, ...], tuple[float, ...]]


def _range(tensors: Mapping[str, Tensor], dynamic: bool, where: str, name: str) -> Numbers:
    if dynamic:
        return (), ()
    if SCALE not in tensors:
        raise UserError(f"{where}: {name} has no {SCALE}")
    zero = tensors.get(ZERO, torch.zeros(1))
    return (float(tensors[SCALE]),), (float(zero) + MIDDLE,)


def _scheme(dynamic: bool, strategy: str, symmetric: bool) -> dict[str, Any]:
    return {
        "num_bits": BITS,
        "type": "int",
        "symmetric": symmetric,
        "dynamic": dynamic,
        "strategy": strategy,
    }


def _sites(task: Task) -> dict[str, list[str]]:
    """The linears that read the tensor of each site, in the spelling of `task.quantizers`."""
    found = {}
    for index in range(len(task.blocks)):
        for group in task.arch.groups:
            names = [f"{task.arch.blocks}.{index}.{linear}" for linear in group.linears]
            found[f"{names[0]}.input".replace(".", "/")] = names
    return found
