"""DGQ's second level along the inputs: scales of a row are whole multiples of one number."""

from dataclasses import replace

import pytest
import torch
from helpers.problems import is_stored_whole, problem
from hydra import compose

from qexp.common.errors import UserError
from qexp.config.instantiate import instantiate
from qexp.grid import IntGrid, Scale
from qexp.grid.row_multiples import row_multiples
from qexp.packed.coded import Coded
from qexp.solvers import GPTQ, OBQ, RTN, SpQR

SECOND = IntGrid(8, symmetric=True, axis="inputs", scale_dtype="float16")
PLAIN = IntGrid(4, group_size=16, scale_dtype="float16")
DGQ = replace(PLAIN, scales=SECOND)
SOLVERS = [
    RTN(DGQ),
    GPTQ(DGQ, static_groups=True),
    GPTQ(DGQ, act_order=True, static_groups=True, descend=1),
    OBQ(DGQ),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_the_weights_of_a_row_are_bytes_times_its_scale(solver) -> None:
    weight, hessian = problem()
    weight[3, :16] = 0  # a group whose scale is arbitrary
    coded = solver(weight, hessian).packed
    assert isinstance(coded, Coded) and isinstance(coded.scale, Coded)
    multiples = coded.scale.codes - 128
    assert multiples.min() >= 1 and multiples.max() <= 127
    own = coded.scale.scale
    assert own.shape == (48, 1)
    whole = coded.dequantize().double() / own.double()
    torch.testing.assert_close(whole, whole.round(), rtol=0, atol=1e-9)
    assert whole.abs().max() <= 127
    assert len(whole.round().unique()) > 100  # more than the sixteen of a group


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_stored_bits_are_those_of_the_formula(solver) -> None:
    weight, hessian = problem()
    solution = solver(weight, hessian)
    assert is_stored_whole(solution)
    assert solution.bits == pytest.approx(4 + (8 + 4) / 16 + 16 / 96)
    assert DGQ.cost(48, 96) == pytest.approx(solution.bits)
    part = solution.packed.rows(5, 20)
    assert torch.equal(part.dequantize(), solution.weight[5:20])
    assert part.bits() == solution.bits


def test_one_group_in_a_row_is_the_ordinary_grid() -> None:
    weight, _ = problem()
    plain = replace(PLAIN, group_size=None)
    q = plain.scales_of(weight)
    ours = row_multiples(plain, SECOND, q, weight, tried=1)
    assert torch.equal(ours.scale, q.scale) and torch.equal(ours.zero, q.zero)
    best = row_multiples(plain, SECOND, q, weight)

    def error(scale: Scale) -> torch.Tensor:
        return (plain.round(weight, scale) - weight).square().sum(1)

    assert (error(best) <= error(q)).all() and (error(best) < error(q)).any()


def test_errors_count_by_importance_in_the_second_level() -> None:
    weight, hessian = problem()
    counts = hessian.diagonal().expand_as(weight).clone()

    def error(scales: Scale) -> torch.Tensor:
        rounded = Coded.of(PLAIN, weight, scales).dequantize()
        return (counts * (rounded - weight).square()).sum(1)

    plain, counted = DGQ.scales_of(weight), DGQ.scales_of(weight, counts)
    assert (error(counted) <= error(plain) * (1 + 1e-5)).all()
    assert (error(counted) < error(plain)).any()
    solution = GPTQ(DGQ, static_groups=True, importance="diagonal")(weight, hessian)
    assert is_stored_whole(solution)


def test_numbers_that_the_groups_of_a_row_share_are_not_refitted() -> None:
    with pytest.raises(UserError, match=r"^method\.solver\.refit=true: .* weight\.scales=null"):
        GPTQ(DGQ, static_groups=True, refit=True)


def test_rows_do_not_depend_on_each_other() -> None:
    weight, _ = problem()
    assert DGQ.rowwise and DGQ.fits_whole_rows
    assert torch.equal(DGQ(weight)[10:20], DGQ(weight[10:20]))


def test_the_error_lies_between_those_of_group_and_row_scales() -> None:
    weight, _ = problem(96, 384)

    def error(grid: IntGrid) -> float:
        return float((grid(weight) - weight).square().mean())

    assert error(PLAIN) < error(DGQ) < 1.3 * error(PLAIN)
    assert error(DGQ) < 0.8 * error(replace(PLAIN, group_size=None))


@pytest.mark.usefixtures("configured")
def test_the_yaml_is_the_papers_grid() -> None:
    grid = instantiate(compose("config", ["method=rtn", "weight=dgq"]).method).solver.grid
    assert grid.fits_whole_rows and grid.range.norm == 2
    assert 64 * grid.cost(96, 192) == pytest.approx(64 * 4 + 12 + 16 * 64 / 192)
    for words in (["method=spqr"], ["method=gptq", "method.solver.static_groups=false"]):
        with pytest.raises(UserError, match=r"^weight\.scales\.axis=inputs: .* give "):
            instantiate(compose("config", [*words, "weight=dgq"]).method)


@pytest.mark.parametrize(
    "wrong",
    [
        {"real_zero": True},
        {"zeros": IntGrid(8)},
        {"scales": replace(SECOND, symmetric=False)},
        {"scales": replace(SECOND, group_size=4)},
    ],
    ids=str,
)
def test_what_has_no_whole_multiples_is_refused(wrong) -> None:
    with pytest.raises(UserError, match=r"weight\.scales\.axis=inputs: .* give "):
        replace(DGQ, **wrong)
    with pytest.raises(UserError, match=r"axis=rows is unknown: give outputs or inputs"):
        IntGrid(8, axis="rows")


def test_golden_solvers_refuse_a_grid_that_needs_whole_rows() -> None:
    with pytest.raises(UserError, match="give method=gptq"):
        SpQR(DGQ)
