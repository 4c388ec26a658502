"""Attaching a weight quantizer to a linear, and baking its result."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qexp.grid import Grid
from qexp.packed.base import Packed
from qexp.quantizers.adapter import LowRankUpdate
from qexp.quantizers.fake_quantize import FakeQuantize
from qexp.quantizers.scale_rules import ScaleRule
from qexp.quantizers.weight import FakeWeight


def weight_quantizer(linear: nn.Linear) -> FakeWeight:
    """The parametrization that `attach_weight_quantizer` put on a linear."""
    (found,) = (each for each in _chain(linear) if isinstance(each, FakeWeight))
    return found


def float_weight(linear: nn.Linear) -> Float[Tensor, "rows columns"]:
    """The weight before rounding."""
    chain: Any = linear.parametrizations["weight"]  # type: ignore[index]
    weight: Tensor = chain.original
    for inner in chain:
        if isinstance(inner, FakeWeight):
            break
        weight = inner(weight)
    return weight


def _chain(linear: nn.Linear) -> list[nn.Module]:
    return list(linear.parametrizations["weight"])  # type: ignore[index]


def attach_weight_quantizer(
    linear: nn.Linear, rule: ScaleRule, grid: Grid, fake_quantize: FakeQuantize
) -> None:
    """Round the weight of a linear whenever it is used."""
    made = rule(linear.weight, grid, fake_quantize).to(linear.weight.device)
    parametrize.register_parametrization(linear, "weight", made, unsafe=True)


def attach_update(linear: nn.Linear, update: LowRankUpdate) -> None:
    """Add a low-rank update to what the parametrizations so far make of the weight."""
    parametrize.register_parametrization(linear, "weight", update, unsafe=True)


def merge(linear: nn.Linear) -> None:
    """Make what the parametrizations make of a float weight permanent."""
    if parametrize.is_parametrized(linear, "weight"):
        parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)


@torch.no_grad()
def bake(linear: nn.Linear) -> Packed:
    """Replace the parametrization by a plain weight with the values of its last forward pass.

    Returns the stored form of that weight.
    """
    packed = weight_quantizer(linear).coded(float_weight(linear))
    last = _chain(linear)[-1]
    if isinstance(last, LowRankUpdate):
        packed = last.packed(packed)
    parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)
    linear.weight.data = packed.dequantize().to(linear.weight)
    return packed
