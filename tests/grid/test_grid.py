"""Grids: exact values, granularity, storage costs, refusals."""

from math import inf, nan

import pytest
import torch

from qexp.common.errors import UserError
from qexp.grid import IntGrid, LevelGrid, Scale
from qexp.grid.float_formats import levels
from qexp.grid.ranges import MSE, RMS, Entropy, MinMax, MovingAverage, Percentile

GRIDS = [
    IntGrid(2),
    IntGrid(3, symmetric=True),
    IntGrid(3, symmetric=True, narrow=True),
    IntGrid(4, group_size=16),
    IntGrid(8, symmetric=True, group_size=32, scale_dtype="float16"),
    IntGrid(4, include_zero=False, real_zero=True),
    IntGrid(4, per_tensor=True),
    LevelGrid("nf4", group_size=16),
    LevelGrid("e2m1"),
    LevelGrid("e4m3"),
    LevelGrid("e5m2", per_tensor=True),
]


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(12, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rounding_is_idempotent_and_stays_on_few_values(grid, x):
    q = grid.fit(x[:, :16])
    rounded = grid.round(x[:, :16], q)
    assert torch.equal(grid.round(rounded, q), rounded)
    rows = [rounded.flatten()] if grid.per_tensor else list(rounded)
    assert all(len(row.unique()) <= 2**grid.bits for row in rows)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_each_value_goes_to_the_nearest(grid, x):
    q = grid.fit(x)
    values = grid.decode(torch.arange(len_of(grid)).float().expand(12, -1), q)
    nearest = (x[:, :, None] - values[:, None]).abs().amin(-1)
    torch.testing.assert_close((grid.round(x, q) - x).abs(), nearest, atol=1e-6, rtol=1e-4)


def len_of(grid) -> int:
    return len(levels(grid.kind)) if isinstance(grid, LevelGrid) else 2**grid.bits


def test_integer_formula_by_hand():
    x = torch.tensor([[-1.0, 0.2, 2.0]])
    q = IntGrid(2).fit(x)  # scale = 3 / 3, zero = round(1 / 1)
    assert (q.scale.item(), q.zero.item()) == (1.0, 1.0)
    assert IntGrid(2)(x).tolist() == [[-1.0, 0.0, 2.0]]
    symmetric = IntGrid(2, symmetric=True).fit(x)  # scale = 2·2 / 3, zero = 2
    assert symmetric.scale.item() == pytest.approx(4 / 3)
    assert symmetric.zero.item() == 2


def test_a_narrow_grid_has_both_ends_of_its_range(x):
    """LLM-QAT's step, max / (2^(b-1) - 1), where the full range's is max / ((2^b - 1) / 2)."""
    grid = IntGrid(4, symmetric=True, narrow=True)
    q = grid.fit(x)
    reach = x.abs().amax(1, keepdim=True)
    torch.testing.assert_close(q.scale, reach / 7)
    codes = grid.encode(torch.cat([x, -reach, reach, -2 * reach], 1), q) - q.zero
    assert codes[:, -3:].tolist() == [[-7.0, 7.0, -8.0]] * 12 and codes[:, :-1].abs().max() == 7
    torch.testing.assert_close(grid(reach), reach)
    assert grid.cost(8, 128) == IntGrid(4, symmetric=True).cost(8, 128)
    with pytest.raises(UserError, match=r"^narrow=true.*give symmetric=true"):
        IntGrid(4, narrow=True)


def test_positive_rows_are_widened_to_zero_only_when_asked():
    x = torch.tensor([[3.0, 4.0, 5.0, 6.0]])
    assert IntGrid(2, include_zero=False, real_zero=True)(x).tolist() == x.tolist()
    assert IntGrid(2)(x).tolist() == [[4.0, 4.0, 4.0, 6.0]]


@pytest.mark.parametrize("value", [0.0, 2.5, -3.0])
def test_constant_rows_survive(value):
    x = torch.full((2, 8), value)
    for grid in (IntGrid(3), IntGrid(3, include_zero=False, real_zero=True), LevelGrid("nf4")):
        torch.testing.assert_close(grid(x), x)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)]
)
def test_float_formats_round_as_casts_do(kind, dtype, x):
    unit = Scale(torch.ones(1, 1), torch.zeros(1, 1))
    top = levels(kind)[-1]
    assert top == torch.finfo(dtype).max
    table = torch.tensor(levels(kind))
    ties = (table[1:] + table[:-1]) / 2
    for values in (x * 3, x * 1e-3, ties[None]):
        assert torch.equal(LevelGrid(kind).round(values, unit), values.to(dtype).float())


def test_fp4_and_nf4_levels():
    assert levels("e2m1")[8:] == (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    nf4 = levels("nf4")
    assert len(nf4) == 16 and nf4[0] == -1 and nf4[-1] == 1 and 0 in nf4
    # The published table of QLoRA, appendix E.
    assert nf4[1] == pytest.approx(-0.6961928009986877, abs=1e-6)
    assert nf4[8] == pytest.approx(0.07958029955625534, abs=1e-6)


def test_group_cost_counts_scales_and_zeros():
    assert IntGrid(3, group_size=64).cost(8, 128) == 3 + (32 + 3) / 64
    assert IntGrid(4, symmetric=True, scale_dtype="float16").cost(8, 128) == 4 + 16 / 128
    assert LevelGrid("nf4", group_size=32, scale_dtype="float16").cost(8, 128) == 4.5


@pytest.mark.parametrize("bits", [1, 17, 0, -3])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(UserError, match=rf"^bits={bits}: .*2 to 16"):
        IntGrid(bits)


def test_groups_of_a_tensor_with_one_scale_are_refused():
    with pytest.raises(
        UserError, match=r"^per_tensor=true with group_size=64.*weight\.group_size=null"
    ):
        IntGrid(4, group_size=64, per_tensor=True)


@pytest.mark.parametrize(
    ("estimator", "key", "values"),
    [
        (Percentile, "share", (0.999, 50.0, 100.1, nan)),
        (MinMax, "keep", (0.0, 1.1, nan)),
        (MSE, "steps", (0, True)),
        (MSE, "shrink", (0.0, 1.1)),
        (MSE, "norm", (0.0, inf, nan)),
        (MovingAverage, "momentum", (-0.1, 1.0)),
        (RMS, "clip_at", (0.0, inf)),
        (Entropy, "bins", (0, True)),
        (Entropy, "stride", (0, -8)),
    ],
)
def test_ranges_that_cannot_be_are_refused(estimator, key, values):
    for value in values:
        with pytest.raises(UserError, match=rf"^range\.{key}={value}: give "):
            estimator(**{key: value})


def test_group_that_does_not_divide_is_refused(x):
    with pytest.raises(UserError, match=r"group_size=48 does not divide"):
        IntGrid(4, group_size=48)(x)


def test_mse_range_is_never_worse_than_minmax(x):
    for bits in (8, 4, 3, 2):
        plain, searched = IntGrid(bits), IntGrid(bits, range=MSE(norm=2.0))
        before = (plain(x) - x).pow(2).sum(1)
        after = (searched(x) - x).pow(2).sum(1)
        assert (after <= before * (1 + 1e-6)).all()
    assert after.sum() < before.sum()


def test_percentile_drops_what_lies_outside():
    x = torch.arange(1000.0)[None]
    low, high = Percentile(99.0)(x, IntGrid(8))
    assert (low.item(), high.item()) == (10.0, 989.0)


@pytest.mark.parametrize("estimator", [MinMax(), Percentile(90.0), MSE()], ids=str)
def test_histogram_counts_stand_for_repeated_values(estimator):
    values = torch.tensor([[-2.0, -1.0, 0.5, 4.0]])
    counts = torch.tensor([[3.0, 10.0, 7.0, 1.0]])
    repeated = values.repeat_interleave(counts[0].long(), 1)
    grid = IntGrid(3, range=estimator)
    for a, b in zip(grid.fit(values, counts), grid.fit(repeated), strict=True):
        torch.testing.assert_close(a, b)


def test_min_max_leaves_a_share_of_both_ends() -> None:
    x = torch.tensor([[-2.0, 0.5, 1.0]])
    low, high = MinMax(0.9)(x, IntGrid(3))
    assert low.item() == pytest.approx(-1.8) and high.item() == pytest.approx(0.9)
    assert [end.item() for end in MinMax()(x, IntGrid(3))] == [-2.0, 1.0]
