"""Low-rank corrections: the optimum in each metric, what they reduce to, and what they store."""

import pytest
import torch
from helpers.problems import is_stored_whole, loss, problem
from torch import Tensor

from qexp.common.errors import UserError
from qexp.grid import IntGrid
from qexp.packed.low_rank import LowRank
from qexp.solvers import GPTQ, RTN, BiLLM, SpQR
from qexp.solvers.alternation import nearest_product
from qexp.solvers.base import Moments
from qexp.solvers.factor import inverse_factor
from qexp.solvers.low_rank import METRICS, Correction
from qexp.solvers.pbllm import PBLLM
from qexp.solvers.quip import QuIP

GRID = IntGrid(3, group_size=32, scale_dtype="float16")
EXACT = {"factors": "float32", "damp": 0.0}


def exact() -> tuple[Tensor, Tensor, Tensor]:
    """A matrix, a Hessian that is symmetric to the last bit, and U with H⁻¹ = Uᵀ U; in float64."""
    error, hessian = (each.double() for each in problem())
    hessian = (hessian + hessian.T) / 2
    return error, hessian, torch.linalg.cholesky(hessian.inverse(), upper=True)


@pytest.mark.parametrize("rank", [1, 7, 48])
def test_what_remains_is_the_sum_of_the_dropped_squares(rank: int) -> None:
    error, hessian, upper = exact()
    outputs, inputs = nearest_product(error, upper, rank)
    remaining = loss(error - outputs @ inputs, hessian)
    values = torch.linalg.svdvals(error @ torch.linalg.cholesky(hessian))
    expected = float(values[rank:].square().sum())
    assert remaining == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_a_step_in_any_direction_is_worse() -> None:
    error, hessian, upper = exact()
    outputs, inputs = nearest_product(error, upper, 5)
    best = loss(error - outputs @ inputs, hessian)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        step = 1e-3 * torch.randn(outputs.shape, generator=generator, dtype=torch.float64)
        assert loss(error - (outputs + step) @ inputs, hessian) > best


@pytest.mark.parametrize("seed", range(3))
def test_the_full_metric_is_the_best_in_the_hessian(seed: int) -> None:
    weight, hessian = problem(seed=seed)
    base = RTN(GRID)
    plain = loss(base(weight).weight - weight, hessian)
    identity, diagonal, full = (
        loss(Correction(0.15, metric).around(base)(weight, hessian).weight - weight, hessian)
        for metric in METRICS[:3]
    )
    assert full < diagonal < plain and full < identity < plain
    assert full < 0.75 * plain


def test_a_diagonal_of_ones_is_lorc() -> None:
    weight, hessian = problem()
    lorc = Correction(8, "identity", **EXACT).around(RTN(GRID))(weight, hessian).weight
    ones = Correction(8, "diagonal", **EXACT).around(RTN(GRID))
    torch.testing.assert_close(ones(weight, 3 * torch.eye(weight.shape[1])).weight, lorc)
    # Directly: the best rank-8 matrix in the Frobenius norm.
    error = (weight - RTN(GRID)(weight).weight).double()
    left, values, right = torch.linalg.svd(error, full_matrices=False)
    product = left[:, :8] * values[:8] @ right[:8]
    torch.testing.assert_close(lorc, (weight.double() - error + product).float())


def test_the_whole_rank_is_the_weight_itself_and_rank_0_the_solver() -> None:
    weight, hessian = problem()
    solver = GPTQ(GRID)
    assert Correction(0).around(solver) is solver and Correction(0.0).around(solver) is solver
    for metric in METRICS[:3]:
        whole = Correction(48, metric, **EXACT).around(solver)(weight, hessian)
        torch.testing.assert_close(whole.weight, weight)


def test_inputs_without_data_take_no_part() -> None:
    weight, hessian = problem()
    hessian[:, 5] = hessian[5] = 0
    for metric in ("diagonal", "full"):
        packed = Correction(0.1, metric).around(GPTQ(GRID))(weight, hessian).packed
        assert isinstance(packed, LowRank) and isinstance(packed.inputs, Tensor)
        assert packed.inputs[:, 5].abs().max() < 1e-6 * packed.inputs.abs().max()


def test_further_rounds_keep_the_best() -> None:
    weight, hessian = problem()
    errors = [
        loss(
            Correction(0.1, rounds=rounds).around(GPTQ(GRID))(weight, hessian).weight - weight,
            hessian,
        )
        for rounds in (1, 2, 4)
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.95 * errors[0]


def test_the_error_of_a_carrying_solver_is_measured_from_its_aim() -> None:
    weight, hessian = problem()
    moved = Moments(hessian, hessian + 0.1 * torch.diag(hessian.diagonal()))
    base = GPTQ(GRID, carry=0.5)
    solver = Correction(0.2).around(base)
    assert solver.needs_moments
    aim = base.aim(weight, moved)
    assert torch.equal(solver.aim(weight, moved), aim)
    before = base(weight, hessian, moved).weight
    after = solver(weight, hessian, moved).weight  # type: ignore[call-arg]
    assert loss(after - aim, hessian) < 0.8 * loss(before - aim, hessian)


BASES = {
    "rtn": RTN(GRID),
    "gptq": GPTQ(GRID, act_order=True),
    "spqr": SpQR(IntGrid(3, group_size=16, real_zero=True, include_zero=False), act_order=True),
    "billm": BiLLM(block=48, scale_dtype="float16"),
    "pbllm": PBLLM(scale_dtype="float16"),
    "quip": QuIP(IntGrid(3, per_tensor=True)),
}


@pytest.mark.parametrize("factors", ["float16", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("name", BASES)
def test_storage_gives_the_weights_back_and_takes_the_bits_of_the_formula(
    name: str, factors: str
) -> None:
    rows, columns, rank = 48, 96, 6
    weight, hessian = problem(rows, columns)
    base, solver = BASES[name], Correction(rank, factors=factors).around(BASES[name])
    solution = solver(weight, hessian)
    assert is_stored_whole(solution)
    each = {"float16": (16, 16), "bfloat16": (16, 16)}.get(factors)
    if each is None:  # one scale for all 48 outputs, and for all 96 inputs, of each rank
        bits = int(factors[3:])
        each = bits + 16 / rows, bits + 16 / columns
    factor_bits = rank * (each[0] * rows + each[1] * columns) / (rows * columns)
    assert solution.bits == pytest.approx(base(weight, hessian).bits + factor_bits)
    assert loss(solution.weight - weight, hessian) < loss(
        base(weight, hessian).weight - weight, hessian
    )
    with pytest.raises(ValueError, match="cannot be separated"):
        solution.packed.rows(0, 4)


def test_damping_is_that_of_the_factorization() -> None:
    weight, hessian = problem()
    solution = Correction(4, damp=0.3).around(RTN(GRID))(weight, hessian)
    assert solution.damp == inverse_factor(hessian, 0.3).damp == 0.3


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": -1},
        {"rank": 2.5},
        {"metric": "trace"},
        {"factors": "int3"},
        {"rounds": 0},
        {"damp": -1},
    ],
    ids=str,
)
def test_settings_are_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError, match=rf"method\.residual\.{next(iter(wrong))}="):
        Correction(**wrong)  # type: ignore[arg-type]


def test_a_rank_above_that_of_a_layer_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"method\.residual\.rank=49: a \[48, 96\] matrix has rank 48"
    ):
        Correction(49).around(RTN(GRID)).check(48, 96)


def fisher(rows: int = 48, columns: int = 96) -> Tensor:
    """Squared gradients that differ most between rows and between columns."""
    generator = torch.Generator().manual_seed(5)
    sides = torch.rand(rows, 1, generator=generator) * 9, torch.rand(columns, generator=generator)
    return sides[0] * sides[1] * (0.5 + torch.rand(rows, columns, generator=generator))


def test_loftq_leaves_less_than_one_rounding() -> None:
    """2310.08659: alternation against the start of QLoRA (no product) and one round of it."""
    weight, _ = problem()
    eye = torch.eye(96)
    grid = IntGrid(2, group_size=32, scale_dtype="float16")

    def error(made: Tensor) -> float:
        return float((made - weight).square().sum())

    plain = error(RTN(grid)(weight).weight)
    one, five = (
        error(Correction(4, "identity", rounds=rounds).around(RTN(grid))(weight, eye).weight)
        for rounds in (1, 5)
    )
    assert five <= one < plain and five < 0.98 * one


def test_equal_squared_gradients_weigh_nothing() -> None:
    weight, _ = problem()
    settings = {"rank": 4, "rounds": 3, "factors_first": True, **EXACT}
    plain = Correction(metric="identity", **settings).around(RTN(GRID))(weight, torch.eye(96))
    ones = Correction(metric="fisher", **settings).around(RTN(GRID))(weight, torch.ones(48, 96))
    torch.testing.assert_close(ones.weight, plain.weight, rtol=1e-4, atol=1e-4)


def test_the_fisher_metric_is_the_best_in_it() -> None:
    weight, diagonal = problem()[0], fisher()
    weighted = Correction(4, "fisher", rounds=20, factors_first=True, until_worse=True)
    solver = weighted.around(RTN(GRID))
    assert solver.needs_diagonal and not solver.rowwise
    made = solver(weight, diagonal)
    assert is_stored_whole(made)
    eye = torch.eye(96)
    others = [
        RTN(GRID)(weight).weight,
        Correction(4, "identity", rounds=5).around(RTN(GRID))(weight, eye).weight,
    ]
    least = solver.measure(made.weight - weight, diagonal)
    assert all(least < 0.98 * solver.measure(other - weight, diagonal) for other in others)


def test_rounds_end_where_the_error_rises() -> None:
    calls: list[int] = []

    class Counted(RTN):
        def __call__(self, weight, hessian=None):  # type: ignore[no-untyped-def]
            calls.append(1)
            return super().__call__(weight, hessian)

    weight, _ = problem()
    settings = {"rank": 4, "metric": "identity", "rounds": 30}
    kept = []
    for until_worse in (True, False):
        calls.clear()
        solver = Correction(**settings, until_worse=until_worse).around(Counted(GRID))
        kept.append(float((solver(weight, torch.eye(96)).weight - weight).square().sum()))
        assert (len(calls) < 30) is until_worse
    assert kept[1] <= kept[0]


def test_the_fisher_metric_is_for_round_to_nearest() -> None:
    with pytest.raises(UserError, match=r"^method\.residual\.metric=fisher: GPTQ .*lq_lora"):
        Correction(metric="fisher").around(GPTQ(GRID))
