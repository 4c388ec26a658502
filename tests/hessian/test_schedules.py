"""Schedules of Hessians from gradients: order, storage, and runs that were killed."""

import shutil

import pytest
import torch
from helpers.hessians import GRID, keeping, measured
from helpers.models import joined, task_of

from qexp.common.cache import Cache
from qexp.hessian import Layerwise, OutputAdaptive, TokenWeighted
from qexp.hessian.from_gradients import FromGradients
from qexp.methods.blockwise import Blockwise
from qexp.solvers import GPTQ, BiLLM
from qexp.walk import walk

pytestmark = pytest.mark.usefixtures("own_cache")


def test_schedules_see_the_blocks_before_quantized_when_they_say_so():
    def hessians(schedule: str) -> list[torch.Tensor]:
        seen, source = [], OutputAdaptive(schedule=schedule, k=2)
        found, for_each_group = {}, None
        for block in walk(task := task_of("llama"), [joined("llama")]):
            for_each_group = for_each_group or source.prepare(block)
            for_each_group(block, keeping(found, block.name))
            seen.append(found[f"{block.name}.mlp.up_proj"])
            for linear in block.linears.values():
                linear.weight.data = GRID(linear.weight.data)
        assert not any(parameter.grad is not None for parameter in task.parameters())
        return seen

    per_block, every_k, one_pass = map(hessians, ("per_block", "every_k", "one_pass"))
    torch.testing.assert_close(per_block[0], one_pass[0])
    for index in (1, 2):
        assert not torch.allclose(per_block[index], one_pass[index], rtol=0.05)
    torch.testing.assert_close(every_k, [one_pass[0], one_pass[1], per_block[2]])


@pytest.fixture
def passes(monkeypatch) -> list[list[int]]:
    """The blocks of each pass of gradients."""
    done: list[list[int]] = []
    original = FromGradients._gradient_hessians

    def measure(self, block, covered, *rest):
        done.append(list(covered))
        return original(self, block, covered, *rest)

    monkeypatch.setattr(FromGradients, "_gradient_hessians", measure)
    return done


@pytest.mark.parametrize("memory", [8.0, 1e-9])
def test_one_pass_is_measured_once_and_shared(passes, memory):
    source = OutputAdaptive(schedule="one_pass", memory=memory)
    first = measured(task_of("llama"), source, [joined("llama")])
    assert passes == ([[0, 1, 2]] if memory > 1 else [[0], [1], [2]])
    again = measured(task_of("llama"), source, [joined("llama")])
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert len(passes) in (1, 3)
    measured(task_of("llama"), source, [{"input_ids": joined("llama")["input_ids"] + 1}])
    assert len(passes) in (2, 6)  # other data, other Hessians


@pytest.mark.parametrize("writable", [True, False])
def test_what_waits_on_disk_is_what_memory_would_hold(tmp_path, monkeypatch, writable):
    found = []
    for memory in (8.0, 1e-9):
        monkeypatch.setenv("QEXP_CACHE_DIR", str(tmp_path / str(memory)))
        if not writable:
            monkeypatch.setattr(Cache, "put", lambda *_: False)
        source = TokenWeighted(schedule="one_pass", memory=memory)
        found.append(measured(task_of("llama"), source, [joined("llama")]))
        kept = list((tmp_path / str(memory)).rglob("hessians/*.safetensors"))
        assert len(kept) == (3 if writable else 0)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("solver", "source", "propagate", "killed", "solved"),
    [
        (GPTQ(GRID), Layerwise(), True, 2, [2]),
        (BiLLM(block=32), Layerwise(), False, 1, [1, 2]),
        (GPTQ(GRID), OutputAdaptive(), True, 1, [1, 2]),
        (GPTQ(GRID), OutputAdaptive(schedule="every_k", k=2), True, 1, [0, 1, 2]),
        (BiLLM(block=32), OutputAdaptive(schedule="every_k", k=2), True, 2, [2]),
        (GPTQ(GRID), OutputAdaptive(schedule="every_k", k=2), False, 1, [1, 2]),
        (GPTQ(GRID), OutputAdaptive(schedule="one_pass"), True, 1, [1, 2]),
    ],
    ids=str,
)
def test_a_killed_run_goes_on_at_the_block(
    tmp_path, monkeypatch, solver, source, propagate, killed, solved
):
    method = Blockwise(solver, source, propagate)
    whole = task_of("llama")
    records = method(whole, lambda: [joined("llama")])
    visited: list[int] = []
    original = Blockwise._solve

    def until(stop: int):
        def solve(self, block, for_each_group):
            if block.index == stop:
                raise KeyboardInterrupt
            visited.append(block.index)
            return original(self, block, for_each_group)

        return solve

    monkeypatch.setattr(Blockwise, "_solve", until(killed))
    with pytest.raises(KeyboardInterrupt):
        method(task_of("llama"), lambda: [joined("llama")])
    visited.clear()
    shutil.rmtree(tmp_path / "cache" / "hessians", ignore_errors=True)  # a cache may be emptied
    monkeypatch.setattr(Blockwise, "_solve", until(99))
    resumed = task_of("llama")
    again = method(resumed, lambda: [joined("llama")])
    assert visited == solved
    assert [r.error for r in again] == [r.error for r in records]
    torch.testing.assert_close(
        dict(resumed.named_parameters()), dict(whole.named_parameters()), rtol=0, atol=0
    )
