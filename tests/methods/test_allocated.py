"""Bit allocation on a whole model: costs, budgets, and solutions that are used again."""

import csv

import pytest
import torch
from helpers.hessians import measured
from helpers.models import joined, task_of
from helpers.pipeline import PPL, run
from helpers.problems import loss
from hydra import compose

from qexp import pipeline
from qexp.common.errors import UserError
from qexp.config.instantiate import instantiate
from qexp.grid import IntGrid, LevelGrid
from qexp.hessian import BothSides, Diagonal, Layerwise, OutputAdaptive, TokenWeighted
from qexp.methods.allocated import Allocated
from qexp.methods.blockwise import Blockwise
from qexp.methods.option_costs import FirstOrder, Fisher, Loss, MeasuredLoss, Metric, Relative
from qexp.solvers import GPTQ, RTN, BiLLM
from qexp.solvers.allocation import DP, Lagrange, Rule, Uniform

pytestmark = pytest.mark.usefixtures("configured", "own_cache")

OPTIONS = [2, 3, 4]
GRID = IntGrid(3, group_size=32, scale_dtype="float16")
RTNS = Blockwise(RTN(GRID), Layerwise())
RELATIVE, EXACT = Relative(), DP()


def allocated(
    budget: float, metric: Metric = RELATIVE, rule: Rule = EXACT, method: Blockwise = RTNS
) -> Allocated:
    return Allocated(OPTIONS, budget, metric, rule, method)


def data() -> list[dict]:
    return [joined("llama")]


@pytest.fixture(scope="module")
def rounded(tmp_path_factory):
    """A float task, and records of its linears at three bits."""
    task, other = task_of("llama"), task_of("llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QEXP_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        return task, RTNS(other, data)


def change(task, record) -> torch.Tensor:
    return record.packed.dequantize() - task.model.get_submodule(record.name).weight.detach()


@pytest.mark.parametrize("source", [OutputAdaptive, TokenWeighted])
def test_the_loss_is_that_of_the_second_order_in_one_unit(rounded, source) -> None:
    task, records = rounded
    hessian = source(schedule="one_pass")
    hessians = measured(task_of("llama"), hessian, data())
    costs, averages = (Loss(hessian, average)(task, data(), records) for average in (False, True))
    assert list(costs) == [record.name for record in records]
    for record in records:
        delta, h = change(task, record), hessians[record.name]
        assert costs[record.name] == pytest.approx(loss(delta, h) / record.rows, rel=1e-4)
        mean = float(h.diagonal().mean() * delta.square().sum()) / record.rows
        assert averages[record.name] == pytest.approx(mean, rel=1e-4)


def test_the_fisher_cost_weighs_every_squared_change(rounded) -> None:
    task, records = rounded
    fisher = measured(task_of("llama"), Diagonal(schedule="one_pass"), data())
    costs = Fisher(Diagonal())(task, data(), records)
    for record in records:
        expected = float((fisher[record.name] * change(task, record).square()).sum())
        assert costs[record.name] == pytest.approx(expected, rel=1e-4)


def test_normal_floats_within_a_budget_are_no_worse_than_one_of_them() -> None:
    method = Blockwise(RTN(LevelGrid("nf4", group_size=32, scale_dtype="float16")), Layerwise())
    step, task = allocated(3.5, Fisher(Diagonal()), method=method), task_of("llama")
    costs, sizes = step._table(task, data())
    uniform = costs[:, 1].sum()
    picked = EXACT(costs, sizes, int(sizes[:, 1].sum()))
    assert sum(costs[n, at] for n, at in enumerate(picked)) <= uniform
    records = step(task, data)
    weights = sum(record.rows * record.columns for record in records)
    assert sum(record.packed.size() for record in records) <= 3.5 * weights
    assert {record.option for record in records} <= {2, 3, 4} and len(
        {record.option for record in records}
    ) > 1


def test_the_measured_loss_is_that_of_the_model_with_one_linear_rounded(rounded) -> None:
    task, records = rounded
    costs = MeasuredLoss(sequences=3)(task, data(), records)
    with torch.no_grad():
        start = float(task.loss(data()[0]))
        for record in (records[0], records[-2]):
            one = task_of("llama")
            one.model.get_submodule(record.name).weight.data = record.packed.dequantize()
            assert costs[record.name] == pytest.approx(float(one.loss(data()[0])) - start, abs=1e-5)


def test_the_first_order_is_that_of_the_rounded_model(rounded) -> None:
    task, records = rounded
    costs = FirstOrder(sequences=2)(task, data(), records)
    model = task_of("llama")
    for record in records:
        model.model.get_submodule(record.name).weight.data = record.packed.dequantize()
    model.loss(data()[0]).backward()
    count = len(data()[0]["input_ids"])
    for record in records:
        gradient = model.model.get_submodule(record.name).weight.grad
        expected = float((gradient * change(task, record)).abs().sum()) * count
        assert costs[record.name] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("source", [TokenWeighted(groups=2), Diagonal(), BothSides()], ids=str)
def test_a_loss_needs_one_matrix_of_the_inputs(source) -> None:
    with pytest.raises(UserError, match=rf"method\.metric\.hessian: {type(source).__name__} has"):
        Loss(source)


@pytest.mark.parametrize("metric", [Loss(TokenWeighted()), FirstOrder(), MeasuredLoss()], ids=str)
def test_a_metric_leaves_the_model_as_it_was(rounded, metric: Metric) -> None:
    _, records = rounded
    task, plain = task_of("llama"), task_of("llama")
    assert all(value == value for value in metric(task, data(), records).values())
    for one, other in zip(task.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other) and one.requires_grad == other.requires_grad
        assert one.grad is None


def test_uniform_bits_are_the_method_itself() -> None:
    task, plain = task_of("llama"), task_of("llama")
    method = Blockwise(GPTQ(GRID), Layerwise())
    expected = method(plain, data)
    records = allocated(3.7, rule=Uniform(), method=method)(task, data)
    assert {record.option for record in records} == {3}
    assert [record.error for record in records] == [record.error for record in expected]
    for one, other in zip(task.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("rule", [DP(), Lagrange()], ids=str)
def test_bits_go_where_they_help_and_the_budget_holds(rule) -> None:
    task = task_of("llama")
    records = allocated(3.3, rule=rule)(task, data)
    assert 3.0 < pipeline.storage(records)["weight/bits"] <= 3.3
    assert {2, 3} <= {record.option for record in records}
    for record in records:
        weight = task.model.get_submodule(record.name).weight
        assert torch.equal(weight, record.packed.dequantize())
        assert record.packed.whole().grid.bits == record.option


def test_a_killed_run_goes_on_and_options_are_solved_once_for_every_budget(monkeypatch) -> None:
    solved: list[str] = []
    original, killed = Blockwise._solve, [True]

    def solve(self, block, for_each_group):
        if killed[0] and self.propagate and block.index == 1:
            raise KeyboardInterrupt
        solved.append(f"{block.index} {'quantized' if self.propagate else 'float'}")
        return original(self, block, for_each_group)

    monkeypatch.setattr(Blockwise, "_solve", solve)
    with pytest.raises(KeyboardInterrupt):
        allocated(3.3)(task_of("llama"), data)
    assert solved == [*3 * ["0 float", "1 float", "2 float"], "0 quantized"]
    solved.clear()
    killed[0] = False
    resumed = allocated(3.3)(task_of("llama"), data)
    assert solved == ["1 quantized", "2 quantized"] and len(resumed) == 21
    solved.clear()
    records = allocated(3.0, Loss(TokenWeighted()))(task_of("llama"), data)
    assert solved == ["0 quantized", "1 quantized", "2 quantized"]
    assert pipeline.storage(records)["weight/bits"] <= 3.0


def test_linears_with_one_input_are_stacked_where_they_got_one_option() -> None:
    three, four = RTN(IntGrid(3)), RTN(IntGrid(4))
    method = Blockwise(three, Layerwise(), own={"a.v": four, "a.w": four})
    assert method._stacks(["a.q", "a.v", "a.k", "a.w"]) == [["a.q", "a.k"], ["a.v", "a.w"]]


def test_a_budget_below_the_cheapest_option_names_the_least(monkeypatch) -> None:
    monkeypatch.setattr(Blockwise, "_solve", lambda *_: pytest.fail("work was done"))
    least = 2 + 18 / 32
    with pytest.raises(UserError, match=r"method\.budget=1: .* take [\d.]+ bits per weight") as no:
        allocated(1)(task_of("llama"), lambda: pytest.fail("data were read"))
    assert f"{least:.4f}" in str(no.value)
    monkeypatch.undo()
    records = allocated(least)(task_of("llama"), data)
    assert {record.option for record in records} == {2}


def test_a_budget_below_what_solutions_take_names_the_least() -> None:
    """Of rules that know only after solving: here uniform bits of one option in two."""

    class Dear(RTN):
        """Says nothing of its bits before."""

        def least_bits(self, rows, columns):
            return 0.0

    with pytest.raises(UserError, match=r"method\.budget=1: .* bits per weight at least"):
        allocated(1, method=Blockwise(Dear(GRID), Layerwise()))(task_of("llama"), data)


@pytest.mark.parametrize("options", [[], [2, 2], [1, 2], [2.5], [17], [True]], ids=str)
def test_options_are_checked(options: list) -> None:
    with pytest.raises(UserError, match=r"method\.options=\[.*: give different whole numbers"):
        Allocated(options, 3.0, Relative(), DP(), RTNS)


@pytest.mark.parametrize(
    ("solver", "said"),
    [
        (GPTQ(GRID, carry=0.25), r"method\.quantization\.solver\.carry: "),
        (RTN(LevelGrid("e2m1")), r"method\.options=2: e2m1 has no form of 2 bits; .*weight=nf2"),
        (BiLLM(), r"method\.options=2: BiLLM has no bit width"),
    ],
    ids=["gptaq", "nf4", "billm"],
)
def test_what_has_no_options_is_refused(solver, said: str) -> None:
    with pytest.raises(UserError, match=said):
        allocated(3.0, method=Blockwise(solver, Layerwise()))
    with pytest.raises(UserError, match=r"method\.budget=0"):
        allocated(0)


@pytest.mark.parametrize(
    ("words", "metric", "rule"),
    [
        ([], Loss(TokenWeighted(schedule="one_pass")), DP()),
        (["method/metric=loss_output"], Loss(OutputAdaptive(schedule="one_pass")), DP()),
        (["method/metric=hawq"], Loss(TokenWeighted(schedule="one_pass"), average=True), DP()),
        (["method/metric=relative", "method/rule=uniform"], Relative(), Uniform()),
        (["method/metric=first_order", "method/rule=lagrange"], FirstOrder(), Lagrange()),
        (["method/metric=measured", "method@method.quantization=spqr"], MeasuredLoss(), DP()),
    ],
    ids=str,
)
def test_the_words_of_the_configuration(words, metric, rule) -> None:
    step = instantiate(compose("config", ["method=allocated", *words]).method)
    assert step.metric == metric and step.rule == rule
    assert step.options == OPTIONS and step.budget == 3.0
    assert isinstance(step.quantization, Blockwise)


def test_a_run_keeps_the_chosen_bits_and_reloads(tmp_path) -> None:
    made = tmp_path / "made"
    words = ("model=tiny_llama", "method=allocated", "method.budget=3.3", "calibration.sequences=2")
    metrics = run(made, *words, "activation=int8_tensor")
    assert metrics["weight/bits"] <= 3.3
    with (made / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    options = [int(row["option"]) for row in rows]
    assert len(options) == 21 and set(options) <= set(OPTIONS) and len(set(options)) > 1
    assert all(0 < float(row["bits"]) - int(row["option"]) < 1 for row in rows)
    again = run(tmp_path / "again", "model=from_run", f"run={made}", small=[])
    assert again[PPL] == metrics[PPL]
