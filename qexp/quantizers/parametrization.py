"""Attaching a weight quantizer to a linear, and baking its result."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qexp.grid import Grid
from qexp.packed.coded import Coded
from qexp.quantizers.fake_quantize import FakeQuantize
from qexp.quantizers.scale_rules import ScaleRule
from qexp.quantizers.weight import FakeWeight


def weight_quantizer(linear: nn.Linear) -> FakeWeight:
    """The parametrization that `attach_weight_quantizer` put on a linear."""
    last = linear.parametrizations["weight"][-1]  # type: ignore[index]
    assert isinstance(last, FakeWeight)
    return last


def float_weight(linear: nn.Linear) -> Float[Tensor, "rows columns"]:
    """The weight before rounding."""
    chain: Any = linear.parametrizations["weight"]  # type: ignore[index]
    weight: Tensor = chain.original
    for inner in list(chain)[:-1]:
        weight = inner(weight)
    return weight


def attach_weight_quantizer(
    linear: nn.Linear, rule: ScaleRule, grid: Grid, fake_quantize: FakeQuantize
) -> None:
    """Round the weight of a linear whenever it is used."""
    made = rule(linear.weight, grid, fake_quantize).to(linear.weight.device)
    parametrize.register_parametrization(linear, "weight", made, unsafe=True)


@torch.no_grad()
def bake(linear: nn.Linear) -> Coded:
    """Replace the parametrization by a plain weight with the values of its last forward pass.

    Returns the stored form of that weight.
    """
    packed = weight_quantizer(linear).coded(float_weight(linear))
    parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)
    linear.weight.data = packed.dequantize().to(linear.weight)
    return packed
