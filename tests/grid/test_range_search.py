"""Range searches over zero points and beyond the min-max range; one-bit grids."""

import pytest
import torch
from torch import Tensor

from qexp.common.errors import UserError
from qexp.grid import Grid, IntGrid, Range, least_error
from qexp.grid.range_search import Around, TwoValues, WidthAndZero
from qexp.grid.ranges import MSE, MinMax


def values(rows: int = 6, size: int = 40) -> Tensor:
    x = torch.randn(rows, size, generator=torch.Generator().manual_seed(0))
    return x + torch.linspace(-1, 1, rows)[:, None]


def error(x: Tensor, search: Range, bits: int = 3) -> Tensor:
    grid = IntGrid(bits, range=search)
    return (grid.round(x, grid.fit(x)) - x).abs().pow(2.4).sum(1)


def test_widths_and_zeros_are_all_tried() -> None:
    x = values()
    grid = IntGrid(2, range=WidthAndZero(steps=10))
    whole = x.amax(1, keepdim=True).clamp(min=0) - x.amin(1, keepdim=True).clamp(max=0)
    best = torch.full((6,), torch.inf)
    for step in range(1, 11):
        scale = whole * step / 10 / 3
        for zero in range(4):
            rounded = ((x / scale).round() + zero).clamp(0, 3) - zero
            best = torch.minimum(best, (rounded * scale - x).abs().pow(2.4).sum(1))
    torch.testing.assert_close(error(x, grid.range, bits=2), best)
    assert (error(x, WidthAndZero()) <= error(x, MSE()) * 1.02).all()


def test_multiples_to_either_side_include_min_max() -> None:
    x = values()
    assert (error(x, Around()) <= error(x, MinMax())).all()
    low, high = Around()(x, IntGrid(3))
    factor = high / x.amax(1, keepdim=True)
    torch.testing.assert_close(low, x.amin(1, keepdim=True) * factor)
    assert factor.min() >= 0.9 and factor.max() <= 1.1 and len(factor.unique()) > 1


@pytest.mark.parametrize("search", [WidthAndZero(steps=5), Around(steps=5), TwoValues()], ids=str)
def test_values_that_count_nothing_do_not_matter(search: Range) -> None:
    x, grid = values(), IntGrid(3)
    counts = torch.ones_like(x)
    counts[:, ::4] = 0
    with_others = search(x, grid, counts)
    kept = x[counts > 0].view(6, -1)
    for ours, theirs in zip(with_others, search(kept, grid), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "second", [None, IntGrid(3, group_size=4)], ids=["scales", "grouped scales"]
)
@pytest.mark.parametrize("search", [MSE(), WidthAndZero(steps=5), Around(steps=5)], ids=str)
def test_a_layer_in_parts_is_searched_as_a_whole(search: Range, second, monkeypatch) -> None:
    """Also where parts would divide the rows whose scales are rounded together."""
    x, grid = values(rows=12), IntGrid(3, scales=second)
    counts = torch.rand(x.shape, generator=torch.Generator().manual_seed(1))
    whole = [search(x, grid), search(x, grid, counts)]
    monkeypatch.setattr(least_error, "PART", 3 * x.shape[1])
    for ours, theirs in zip([search(x, grid), search(x, grid, counts)], whole, strict=True):
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("centred", [True, False])
def test_one_bit_is_two_values(centred: bool) -> None:
    x = values()
    grid = IntGrid(1, include_zero=False, real_zero=True, range=TwoValues(centred))
    mean = x.mean(1, keepdim=True)
    reach = (x - mean if centred else x).abs().mean(1, keepdim=True)
    torch.testing.assert_close(grid(x), torch.where(x >= mean, mean + reach, mean - reach))
    for wrong in ({"include_zero": True}, {"real_zero": False}, {"symmetric": True}):
        with pytest.raises(UserError, match="bits=1: give a whole number from 2 to 16"):
            IntGrid(1, **{"include_zero": False, "real_zero": True, **wrong})


def test_what_cannot_be_is_refused() -> None:
    grids: list[Grid] = [IntGrid(3, symmetric=True), IntGrid(3, real_zero=True)]
    for grid in grids:
        with pytest.raises(UserError, match=r"weight/range=mse_zero: .*weight\.symmetric=false"):
            WidthAndZero().check(grid)
    for make, wrong in (
        (WidthAndZero, {"steps": 0}),
        (Around, {"reach": 1.0}),
        (Around, {"norm": 0.0}),
    ):
        with pytest.raises(Exception, match=f"{next(iter(wrong))}="):
            make(**wrong)
