"""Tables of rows: k-means near its optimum, least squares, coordinate descent, storage."""

from itertools import pairwise

import pytest
import torch
from helpers.models import joined, task_of
from helpers.problems import is_stored_whole, loss, problem
from helpers.reference.kmeans import lloyd, optimum
from torch import Tensor

from qexp.common.errors import UserError
from qexp.grid import IntGrid
from qexp.grid.kmeans import kmeans
from qexp.hessian import Diagonal, Layerwise
from qexp.methods.blockwise import Blockwise
from qexp.packed.outliers import Outliers
from qexp.packed.table import Table
from qexp.solvers import GPTQ, LNQ, RTN, SqueezeLLM
from qexp.solvers.codebook import ascending, least_squares, nearest_codes, onto
from qexp.solvers.factor import inverse_factor
from qexp.solvers.sweep import descend, sweep
from qexp.walk import walk


def weighted(rows: int = 12, columns: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix and the sensitivity of its weights, with long tails."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return weight, torch.randn(rows, columns, generator=generator).square().square() + 1e-3


def of(table: Tensor, values: Tensor) -> Tensor:
    return table.gather(1, nearest_codes(values, table))


@pytest.mark.parametrize("levels", [4, 8, 16])
def test_kmeans_is_near_the_optimum_and_at_a_fixed_point(levels: int) -> None:
    weight, sensitivity = weighted()
    table = kmeans(weight, sensitivity, levels)
    change = of(table, weight.double()) - weight
    ours = (sensitivity * change.square()).sum(1)
    best = [optimum(*row, levels) for row in zip(weight, sensitivity, strict=True)]
    assert all(our >= least * (1 - 1e-9) for our, least in zip(ours.tolist(), best, strict=True))
    assert ours.sum() < (1.4 if levels == 4 else 1.1) * sum(best)
    codes = nearest_codes(weight.double(), table)
    for row in range(len(weight)):
        again = lloyd(weight[row].double(), sensitivity[row], table[row].clone(), codes[row], 3)
        torch.testing.assert_close(again, table[row])


def test_equal_weights_are_ordinary_kmeans_and_so_are_none() -> None:
    weight, _ = weighted()
    tables = [kmeans(weight, torch.full((1, 64), scale), 4) for scale in (0.0, 1.0, 37.0)]
    torch.testing.assert_close(tables[0], tables[1])
    torch.testing.assert_close(tables[2], tables[1])
    least = sum(optimum(row, torch.ones(64), 4) for row in weight)
    assert float((of(tables[1], weight.double()) - weight).square().sum()) < 1.05 * least


def test_as_many_levels_as_values_lose_nothing() -> None:
    values = torch.tensor([-3.0, -2.75, 0.0, 0.25, 0.5, 4.0, 4.25, 9.0])
    weight = values[torch.randint(8, (20, 200), generator=torch.Generator().manual_seed(0))]
    sensitivity = weighted(20, 200)[1]
    assert torch.equal(SqueezeLLM(3)(weight, sensitivity).weight, weight)
    assert torch.equal(LNQ(3)(weight, problem(20, 200)[1]).weight, weight)


def test_the_order_of_columns_does_not_matter() -> None:
    weight, sensitivity = weighted()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    straight = SqueezeLLM(3)(weight, sensitivity)
    shuffled = SqueezeLLM(3)(weight[:, order], sensitivity[:, order])
    torch.testing.assert_close(shuffled.weight, straight.weight[:, order], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_grid_with_as_many_values_is_better(bits: int) -> None:
    weight, sensitivity = weighted()
    solver = SqueezeLLM(bits)
    grid = RTN(IntGrid(bits, include_zero=False, scale_dtype="float16"))(weight).weight
    ours = solver.measure(solver(weight, sensitivity).weight - weight, sensitivity)
    assert ours < solver.measure(grid - weight, sensitivity)


def test_a_value_in_the_middle_takes_the_lower_entry() -> None:
    table = torch.tensor([[-1.0, 0.0, 0.5, 4.0]])
    values = torch.tensor([[-9.0, -0.5, -0.49, 0.25, 0.3, 2.25, 99.0]])
    assert nearest_codes(values, table).tolist() == [[0, 0, 1, 1, 2, 2, 3]]
    codes, sorted_table = ascending(torch.tensor([[0, 1, 2]]), torch.tensor([[5.0, 1.0, 3.0]]))
    assert sorted_table.gather(1, codes).tolist() == [[5.0, 1.0, 3.0]]
    assert sorted_table.tolist() == [[1.0, 3.0, 5.0]]


def test_sweep_and_descent_take_a_table_as_they_take_a_grid() -> None:
    weight, hessian = problem()
    grid = IntGrid(3)
    scale = grid.scales_of(weight)
    table = (torch.arange(8.0) - scale.zero) * scale.scale
    factor = inverse_factor(hessian, 0.01)
    nearest = onto(table)
    swept = sweep(weight, factor.upper, lambda *_: (), lambda w: nearest(w, 0), 96).rounded
    reference = GPTQ(grid)(weight, hessian).weight
    assert (swept - reference).abs().lt(1e-5).double().mean() > 0.99
    assert loss(swept - weight, hessian) == pytest.approx(loss(reference - weight, hessian), 1e-3)
    ours = descend(weight, swept, hessian, onto(table))
    flat = scale.map(lambda part: part.squeeze(1))
    theirs = descend(weight, swept, hessian, lambda w, _: grid.round(w, flat))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_least_squares_leave_no_slope_and_unused_entries() -> None:
    weight, hessian = problem()
    table = kmeans(weight, torch.ones(1, 96), 4).float()
    table = torch.cat([table, torch.full((48, 1), 99.0)], 1)
    codes = nearest_codes(weight, table)
    assert int(codes.max()) == 3
    fitted = least_squares(weight, hessian, codes, table)
    assert torch.equal(fitted[:, 4], table[:, 4])
    before, after = table.gather(1, codes) - weight, fitted.gather(1, codes) - weight
    assert loss(after, hessian) < 0.99 * loss(before, hessian)
    slopes = torch.zeros(48, 5).scatter_add(1, codes, after @ hessian)
    start = torch.zeros(48, 5).scatter_add(1, codes, before @ hessian)
    assert slopes.norm() < 1e-4 * start.norm()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_no_step_of_lnq_raises_the_objective(dtype: str) -> None:
    weight, hessian = problem()
    scale = IntGrid(2).scales_of(weight)
    table = ((torch.arange(4.0) - scale.zero) * scale.scale).half().float()
    codes, errors = nearest_codes(weight, table), []
    for rounds in range(5):
        solver = LNQ(2, rounds, cycles=2, scale_dtype=dtype, damp=0.0)
        found, values = solver.improved(weight, hessian, codes, table)
        change = (values.gather(1, found) - weight).double()
        errors.append(((change @ hessian.double()) * change).sum(1))
    for before, after in pairwise(errors):
        assert (after <= before * (1 + 1e-5)).all()
    assert errors[1].sum() < 0.95 * errors[0].sum() and errors[2].sum() < 0.95 * errors[1].sum()


def test_lnq_is_below_its_start_and_below_gptq() -> None:
    weight, hessian = problem()
    ours = LNQ(3)(weight, hessian).weight
    start = SqueezeLLM(3)(weight, hessian.diagonal()[None]).weight
    same = LNQ(3, rounds=0)(weight, hessian).weight
    assert torch.equal(start, same)
    swept = GPTQ(IntGrid(3))(weight, hessian).weight
    for other in (start, swept):
        assert loss(ours - weight, hessian) < loss(other - weight, hessian)


@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_lnq_on_a_diagonal_is_lloyds_algorithm(rounds: int) -> None:
    weight, _ = weighted(columns=96)
    diagonal = weighted(1, 96, seed=1)[1][0]
    start = torch.linspace(-2, 2, 4).expand(12, 4).contiguous()
    codes = nearest_codes(weight, start)
    solver = LNQ(2, rounds, scale_dtype="float32", damp=0.0)
    _, ours = solver.improved(weight, diagonal.diag(), codes, start)
    pairs = zip(weight, codes, strict=True)
    theirs = [lloyd(w, diagonal, start[0].clone(), c, rounds) for w, c in pairs]
    torch.testing.assert_close(ours, torch.stack(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 5])
@pytest.mark.parametrize("share", [0.0, 0.05])
@pytest.mark.parametrize("per_tensor", [False, True])
def test_storage_is_exact_and_its_bits_those_of_the_formula(bits, share, per_tensor) -> None:
    weight, sensitivity = weighted(16, 64)
    solver = SqueezeLLM(bits, 10, per_tensor, share / 5, share, "bfloat16")
    solution = solver(weight, sensitivity)
    assert is_stored_whole(solution)
    tables = 1 if per_tensor else 16
    count = int(share * weight.numel())
    sparse = 32 * count / weight.numel() + 32 / 64 if share else 0
    assert solution.bits == bits + 16 * 2**bits * tables / weight.numel() + sparse
    outliers = solution.packed.outliers
    if share:
        assert isinstance(outliers, Outliers) and len(outliers.values) == count
    else:
        assert outliers is None and solution.paper_bits is None


def test_outliers_are_the_sensitive_and_then_the_largest_and_bend_no_table() -> None:
    weight, sensitivity = weighted(16, 64)
    weight[3, 5], sensitivity[7, 9] = 1000.0, 1e9
    solution = SqueezeLLM(3, sensitive=1 / 1024, outliers=2 / 1024)(weight, sensitivity)
    assert solution.packed.outliers.values.tolist() == [1000.0, float(weight[7, 9].half())]
    assert solution.packed.table.abs().max() < 10
    assert solution.paper_bits == pytest.approx(3 + 16 * 8 / 64 + 48 * 2 / 1024)


def test_rows_are_solved_each_by_itself() -> None:
    weight, hessian = problem()
    for solver, second in ((LNQ(3), hessian), (SqueezeLLM(3), hessian.diagonal()[None])):
        assert solver.rowwise
        whole = solver(weight, second)
        assert isinstance(whole.packed, Table)
        part = solver(weight[16:40], second)
        torch.testing.assert_close(whole.weight[16:40], part.weight, rtol=0, atol=2e-2)
        assert torch.equal(whole.packed.rows(16, 40).dequantize(), whole.weight[16:40])
        assert whole.packed.rows(16, 40).bits() == whole.bits
    assert not SqueezeLLM(3, outliers=0.1).rowwise and not SqueezeLLM(3, per_tensor=True).rowwise
    sparse = SqueezeLLM(3, outliers=0.1)(weight, hessian.diagonal()[None])
    assert torch.equal(sparse.packed.rows(16, 40).dequantize(), sparse.weight[16:40])


@pytest.mark.parametrize("source", [Diagonal(), Layerwise()], ids=str)
def test_records_have_the_solvers_own_measure(source) -> None:
    task, floats = task_of(), task_of()
    records = Blockwise(SqueezeLLM(4), source)(task, lambda: [joined("llama")])
    hessians = source(next(iter(walk(floats, [joined("llama")]))))
    name, linear = next(iter(floats.linears().items()))
    made = next(record for record in records if record.name == name)
    hessian = hessians[name.removeprefix("model.layers.0.")]
    sensitivity = hessian if isinstance(source, Diagonal) else hessian.diagonal()[None]
    weight = linear.weight.detach()
    change = made.packed.dequantize() - weight
    expected = (sensitivity * change.square()).sum() / (sensitivity * weight.square()).sum()
    assert made.error == pytest.approx(float(expected), rel=1e-4)
    assert all(record.error < 0.9 * record.error_before for record in records)


@pytest.mark.parametrize("solver", [LNQ(3), GPTQ(IntGrid(3))], ids=["LNQ", "GPTQ"])
def test_a_diagonal_is_refused_where_products_are_needed(solver) -> None:
    with pytest.raises(UserError, match=f"diagonal: {type(solver).__name__} needs the products"):
        Blockwise(solver, Diagonal())


def test_more_sensitive_weights_than_outliers_are_refused() -> None:
    with pytest.raises(UserError, match=r"method\.solver\.sensitive=0\.1: give at most"):
        SqueezeLLM(sensitive=0.1, outliers=0.05)
