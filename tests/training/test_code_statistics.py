"""Statistics of codes in the log, compared with values by hand."""

import pytest
import torch
from torch import nn

from qexp.grid import IntGrid
from qexp.quantizers.activation import FakeQuant
from qexp.quantizers.fake_quantize import FakeQuantize
from qexp.quantizers.parametrization import attach_weight_quantizer, float_weight, weight_quantizer
from qexp.quantizers.scale_rules import Dynamic, FixedCodes, Static
from qexp.training.code_statistics import CodeStatistics


@pytest.mark.parametrize("bits", [4, 10])
@torch.no_grad()
def test_shares_of_codes_that_move_turn_back_and_are_clipped(bits):
    """Codes 0, 1, 2, 3, a step each; a move that stands still in between is still the last one."""
    top = 2**bits - 1
    linear = nn.Linear(4, 1, bias=False)
    linear.weight.data = torch.tensor([[0.0, 1.0, 2.0, top]])
    attach_weight_quantizer(linear, Static(), IntGrid(bits), FakeQuantize())
    watch, weight = CodeStatistics({"it": linear}), float_weight(linear)
    found = []
    for change in ([0, 0, 0, 0], [1, -1, 0.4, 0], [0, 0, 0, 0], [-1, -1, 1, 2.0]):
        weight += torch.tensor([change])
        moved = watch()
        found.append([moved.whole[name] for name in ("flipped", "oscillated", "clipped", "scale")])
        assert dict(moved.whole) == {k: v for k, v in moved.tensors["it"].items() if k != "zero"}
    # Last: 1 → 0 turns back, 0 → -1 is clipped and stays 0, 2.4 → 3.4 moves, the top is clipped.
    assert found == [[0, 0, 0, 1], [0.5, 0, 0, 1], [0, 0, 0, 1], [0.5, 0.25, 0.5, 1]]


@pytest.mark.parametrize("grid", [IntGrid(3), IntGrid(3, symmetric=True)], ids=str)
@torch.no_grad()
def test_of_a_range_fitted_at_every_step_no_weight_is_clipped(grid):
    linear = nn.Linear(32, 8, bias=False)
    attach_weight_quantizer(linear, Dynamic(), grid, FakeQuantize())
    assert CodeStatistics({"it": linear})().whole["clipped"] == 0


@torch.no_grad()
def test_fixed_codes_have_the_trajectory_of_their_scales():
    linear = nn.Linear(8, 2, bias=False)
    attach_weight_quantizer(linear, FixedCodes(), IntGrid(3), FakeQuantize())
    watch = CodeStatistics({"it": linear})
    assert dict(watch().whole) == {"scale": 1}
    weight_quantizer(linear).scale[0] *= 4
    assert watch().whole["scale"] == pytest.approx(2)  # the geometric mean of 4 and 1


@torch.no_grad()
def test_ranges_of_activations_have_theirs():
    """By hand: codes 0 to 15 of steps of 1, later of 1/2, and values that lie beyond."""
    quantizer = FakeQuant(IntGrid(4, per_tensor=True), dynamic=False)
    quantizer.start_observing()
    quantizer(torch.arange(16.0)[None])
    quantizer.fix_range()
    quantizer.make_trainable(FakeQuantize(), False)
    dynamic = FakeQuant(IntGrid(8), dynamic=True)
    x = torch.tensor([[1.0, 7.0, 8.0, 20.0]])
    watch = CodeStatistics({}, {"at": quantizer, "token": dynamic}, lambda: quantizer(x))
    assert dict(watch().whole) == {"clipped_activations": 0.25, "scale_activations": 1}
    quantizer.scale /= 2
    moved = watch()
    assert moved.whole["clipped_activations"] == 0.5
    assert moved.whole["scale_activations"] == pytest.approx(0.5)
    assert dict(moved.tensors["at"]) == {"clipped": 0.5, "scale": pytest.approx(0.5), "zero": 0}
    assert "token" not in moved.tensors
