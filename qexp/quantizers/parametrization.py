"""Attaching a weight quantizer to a linear, and baking its result."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qexp.grid import Grid
from qexp.packed.coded import Coded
from qexp.quantizers.fake_quantize import Formula
from qexp.quantizers.scale_rules import ScaleRule
from qexp.quantizers.weight import FakeWeight


def fake(linear: nn.Linear) -> FakeWeight:
    """The parametrization that `put` made."""
    last = linear.parametrizations["weight"][-1]  # type: ignore[index]
    assert isinstance(last, FakeWeight)
    return last


def behind(linear: nn.Linear) -> Float[Tensor, "rows columns"]:
    """The weight before rounding."""
    chain: Any = linear.parametrizations["weight"]  # type: ignore[index]
    weight: Tensor = chain.original
    for inner in list(chain)[:-1]:
        weight = inner(weight)
    return weight


def put(linear: nn.Linear, rule: ScaleRule, grid: Grid, formula: Formula) -> None:
    """Round the weight of a linear whenever it is used."""
    made = rule(linear.weight, grid, formula).to(linear.weight.device)
    parametrize.register_parametrization(linear, "weight", made, unsafe=True)


@torch.no_grad()
def bake(linear: nn.Linear) -> Coded:
    """Make the weight plain again, with the values it had as it was used last, and what storage
    keeps of it."""
    packed = fake(linear).coded(behind(linear))
    parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)
    linear.weight.data = packed.dequantize().to(linear.weight)
    return packed
