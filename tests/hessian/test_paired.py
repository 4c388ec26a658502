"""Moments of both streams: the float model's inputs along a walk that quantizes the blocks."""

import pytest
import torch
from helpers.channels import TENSOR, close, drift, logits
from helpers.models import joined, task_of

from qexp.common.errors import UserError
from qexp.grid import IntGrid
from qexp.hessian import Layerwise
from qexp.hessian.output import OutputAdaptive
from qexp.methods.blockwise import Blockwise
from qexp.solvers import GPTQ, SpQR
from qexp.solvers.target import Asymmetric, Same
from qexp.task import Task
from qexp.walk import walk

GRID = IntGrid(3, group_size=32)
FAMILIES = ["gpt2", "opt", "llama", "gemma3", "bert", "vit"]


class Spy(Asymmetric):
    """The moments that each layer was given, in order."""

    seen: list

    def __call__(self, weight, moments):
        self.seen.append(moments)
        return super().__call__(weight, moments)


def spied(family: str, **fields) -> tuple[Task, list]:
    """The quantized model, and the moments that each group of its linears was given."""
    object.__setattr__(spy := Spy(), "seen", [])
    Blockwise(GPTQ(GRID), Layerwise(), target=spy, **fields)(
        task := task_of(family), lambda: [joined(family)]
    )
    return task, spy.seen


def inputs(task: Task, family: str) -> list[torch.Tensor]:
    """The input of each group of linears of every block."""
    found: list[torch.Tensor] = []
    for block in walk(task, [joined(family)]):
        block.observe(lambda _, chunks: found.append(next(chunks)))
    return [x.reshape(-1, x.shape[-1]) for x in found]


@pytest.mark.parametrize("activations", [(), (TENSOR,)], ids=["weights", "activations"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_moments_are_those_of_the_finished_and_of_the_float_model(family, activations):
    """A group is solved when everything before it is final, and so are its inputs."""
    task, seen = spied(family, activations=activations)
    pairs = zip(inputs(task, family), inputs(task_of(family), family), strict=True)
    for moments, (own, x) in zip(seen, pairs, strict=True):
        close(moments.own, 2 / len(x) * own.T @ own, 1e-3)
        close(moments.cross, 2 / len(x) * x.T @ own, 1e-3)


def test_chunks_change_nothing():
    _, whole = spied("llama")
    _, parts = spied("llama", chunk=1)
    close(parts[0].own, whole[0].own, 1e-5)
    close(parts[0].cross, whole[0].cross, 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_models_output_stays_nearer_to_the_float_models(family):
    batch, errors = joined(family), []
    expected = logits(task_of(family), batch)
    for target in (Same(), Asymmetric(), Asymmetric(first_column=True)):
        task = task_of(family)
        Blockwise(GPTQ(GRID), Layerwise(), target=target)(task, lambda: [batch])
        errors.append(drift(task, batch, expected))
    assert max(errors[1:]) < errors[0]


@pytest.mark.parametrize("schedule", ["one_pass", "per_block", "every_k"])
def test_other_hessians_and_solvers_take_the_target(schedule):
    hessian = OutputAdaptive(schedule=schedule)
    records = Blockwise(SpQR(GRID), hessian, target=Asymmetric())(
        task := task_of("llama"), lambda: [joined("llama")]
    )
    assert [record.name for record in records] == list(task.linears())
    assert sum(r.error for r in records) < 0.8 * sum(r.error_before for r in records)


def test_alpha_of_zero_is_the_plain_method():
    tasks = [task_of("llama"), task_of("llama")]
    for task, target in zip(tasks, (Same(), Asymmetric(alpha=0.0)), strict=True):
        Blockwise(GPTQ(GRID), Layerwise(), target=target)(task, lambda: [joined("llama")])
    for one, two in zip(tasks[0].parameters(), tasks[1].parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("method", [{"target": Asymmetric()}, {"solver": GPTQ(GRID, carry=0.25)}])
def test_float_hessians_are_refused(method):
    with pytest.raises(UserError, match=r"method\.propagate=false: .* method\.propagate=true"):
        Blockwise(**{"solver": GPTQ(GRID), "hessian": Layerwise(), "propagate": False} | method)


@pytest.mark.parametrize("schedule", [None, "one_pass", "every_k"])
@pytest.mark.usefixtures("own_cache")
def test_a_killed_run_resumes_with_the_float_stream_where_it_was(monkeypatch, schedule):
    source = Layerwise() if schedule is None else OutputAdaptive(schedule=schedule, k=2)
    target = Asymmetric(first_column=schedule is None)
    method = Blockwise(GPTQ(GRID), source, target=target)
    whole, resumed = task_of("llama"), task_of("llama")
    method(whole, lambda: [joined("llama")])
    solve = Blockwise._solve

    def until_the_last(self, block, for_each_group):
        if block.index == 2:
            raise KeyboardInterrupt
        return solve(self, block, for_each_group)

    monkeypatch.setattr(Blockwise, "_solve", until_the_last)
    with pytest.raises(KeyboardInterrupt):
        method(task_of("llama"), lambda: [joined("llama")])
    monkeypatch.setattr(Blockwise, "_solve", solve)
    method(resumed, lambda: [joined("llama")])
    for one, two in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_first_column_is_for_solvers_that_have_one():
    with pytest.raises(UserError, match=r"method\.target\.first_column=true: SpQR .* give false"):
        Blockwise(SpQR(GRID), Layerwise(), target=Asymmetric(first_column=True))
    Blockwise(SpQR(GRID), Layerwise(), target=Asymmetric(alpha=0.0, first_column=True))


def test_two_corrections_of_the_same_inputs_are_refused():
    with pytest.raises(UserError, match=r"both correct .* method/target=same"):
        Blockwise(GPTQ(GRID, carry=0.25), Layerwise(), target=Asymmetric())
