"""How much of a model's activations and logits exists at one time."""

import pytest

from qexp.task import LOGITS, positions
from qexp.walk import memory


@pytest.mark.parametrize("vocabulary", [50, 32_000, 49_152, 262_144])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_logits_are_the_fewest_positions_of_the_size_that_returns_to_the_system(
    vocabulary, itemsize
):
    found = positions(vocabulary, itemsize)
    assert found % 64 == 0
    assert (found - 64) * vocabulary * itemsize < LOGITS <= found * vocabulary * itemsize


@pytest.mark.parametrize(("room", "expected"), [(0, 1), (1, 1), (2, 2), (3, 2), (7, 4), (8, 8)])
def test_a_chunk_is_the_largest_power_of_two_that_fits(room, expected):
    each = 4 * memory.inside(512, 1536, 576)
    assert memory.sequences(512, 1536, 576, 4, room * each) == expected
