"""What the log says of codes, by hand."""

import pytest
import torch
from torch import nn
from training import task_of

from qexp.fused import Formula
from qexp.grid import IntGrid
from qexp.learned import Static, behind, put
from qexp.movement import Movement


@pytest.mark.parametrize("bits", [4, 10])
@torch.no_grad()
def test_shares_of_codes_that_move_turn_back_and_are_clipped(bits):
    """Codes 0, 1, 2, 3, a step each; a move that stands still in between is still the last one."""
    top = 2**bits - 1
    linear = nn.Linear(4, 1, bias=False)
    linear.weight.data = torch.tensor([[0.0, 1.0, 2.0, top]])
    put(linear, Static(), IntGrid(bits), Formula())
    watch, weight = Movement(task_of(), {"it": linear}, lambda: None), behind(linear)
    found = []
    for change in ([0, 0, 0, 0], [1, -1, 0.4, 0], [0, 0, 0, 0], [-1, -1, 1, 2.0]):
        weight += torch.tensor([change])
        shares = watch()
        found.append([shares[name] for name in ("flipped", "oscillated", "clipped", "scale")])
    # Last: 1 → 0 turns back, 0 → -1 is clipped and stays 0, 2.4 → 3.4 moves, the top is clipped.
    assert found == [[0, 0, 0, 1], [0.5, 0, 0, 1], [0, 0, 0, 1], [0.5, 0.25, 0.5, 1]]
