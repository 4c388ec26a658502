"""HQQ's range: what its search minimizes, and the grids that it takes."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from qexp.common.errors import UserError
from qexp.grid import IntGrid, LevelGrid
from qexp.grid.half_quadratic import HalfQuadratic, shrunk

PLAIN = IntGrid(3, group_size=32, include_zero=False, real_zero=True)


def weights(size: float = 0.02, seed: int = 0) -> Tensor:
    return size * torch.randn(8, 64, generator=torch.Generator().manual_seed(seed))


def hqq(**fields: float) -> IntGrid:
    return replace(PLAIN, range=HalfQuadratic(**fields))


def error(grid: IntGrid, weight: Tensor) -> float:
    return float((grid(weight) - weight).square().sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_squared_error_falls_at_every_step_where_all_errors_are_small(bits: int) -> None:
    """No error is tolerated, so both half-steps are least squares."""
    weight = weights()
    grids = [replace(hqq(steps=n, round_start=False), bits=bits) for n in range(6)]
    errors = [error(grid, weight) for grid in grids]
    assert errors[0] == error(replace(PLAIN, bits=bits), weight)
    assert errors[1] < errors[0]
    assert all(b <= a * (1 + 1e-5) for a, b in pairwise(errors))


def test_the_step_is_that_of_min_max() -> None:
    scales = [grid.scales_of(weights()).scale for grid in (PLAIN, hqq())]
    torch.testing.assert_close(*scales)


def test_a_zero_point_at_its_optimum_stays() -> None:
    """Values on the grid have no error; the mean over a group is its zero point already."""
    codes = torch.arange(8.0).repeat(2, 4)
    weight = (codes - 2.25) * 0.125
    torch.testing.assert_close(hqq()(weight), weight)


def test_only_large_errors_are_tolerated_in_part() -> None:
    """|e|^(p-1)/β exceeds |e| below β^(-1/(2-p)) = 0.170."""
    kept = shrunk(torch.tensor([[0.0, 0.169, -0.169, 0.172, -2.0]]), 10.0, 0.7)
    assert kept[0, :3].eq(0).all()
    expected = torch.tensor([0.172 - 0.172**-0.3 / 10, -(2 - 2**-0.3 / 10)])
    torch.testing.assert_close(kept[0, 3:], expected)


def test_small_weights_are_scale_free_and_large_ones_are_not() -> None:
    weight = weights()
    torch.testing.assert_close(hqq()(weight * 4), hqq()(weight) * 4)
    assert not torch.allclose(hqq()(weight * 400), hqq()(weight) * 400)


def test_counts_weigh_values() -> None:
    weight, counts = weights()[:, :32], torch.zeros(8, 32)
    counts[:, :20] = 1
    counted = hqq().range(weight, PLAIN, counts)
    for one, two in zip(counted, hqq().range(weight[:, :20], PLAIN), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize(
    "grid",
    [
        IntGrid(4),
        replace(PLAIN, include_zero=True),
        replace(PLAIN, symmetric=True),
        LevelGrid("nf4"),
    ],
    ids=str,
)
def test_grids_without_a_real_zero_point_are_refused(grid: IntGrid) -> None:
    with pytest.raises(UserError, match=r"weight/range=hqq: .* weight.real_zero=true"):
        replace(grid, range=HalfQuadratic()).check(8, 64)


@pytest.mark.parametrize("wrong", [{"p": 0.0}, {"beta": -1.0}, {"steps": -1}, {"growth": 0}])
def test_settings_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        HalfQuadratic(**wrong)
