"""Hessians at float weights are measured once, and who reads them comes to the same weights."""

import shutil

import pytest
import torch
from helpers.hessians import GRID
from helpers.models import joined, task_of

from qexp.commands import cache
from qexp.common import cache_entries
from qexp.common.cache import Cache
from qexp.common.errors import UserError
from qexp.grid import IntGrid
from qexp.hessian import AtFloatWeights, Layerwise, OutputAdaptive, TokenWeighted
from qexp.hessian.float_weights import KIND
from qexp.methods.blockwise import Blockwise
from qexp.solvers import GPTQ, RTN, SpQR
from qexp.walk import walk

pytestmark = pytest.mark.usefixtures("own_cache")


SOURCES = [Layerwise(), OutputAdaptive(), TokenWeighted(schedule="one_pass")]
SOLVERS = [GPTQ(IntGrid(2, group_size=32)), SpQR(GRID)]


def weights(source, solver=None, chunk=None, task=None) -> torch.Tensor:
    """All weights after a method that does not propagate."""
    task = task or task_of("llama")
    method = Blockwise(solver or GPTQ(GRID), source, propagate=False, chunk=chunk)
    method(task, lambda: [joined("llama")])
    return torch.cat([linear.weight.flatten() for linear in task.linears().values()])


def kept() -> list[cache_entries.Stored]:
    return [entry for entry in cache_entries.stored() if entry.kind == KIND]


@pytest.mark.parametrize("source", SOURCES, ids=str)
@pytest.mark.parametrize(
    "solver", [GPTQ(IntGrid(2, group_size=32)), SpQR(GRID)], ids=["gptq", "spqr"]
)
def test_a_second_job_runs_nothing_on_the_calibration_data(source, solver, tmp_path):
    expected = weights(source, solver)
    shutil.rmtree(tmp_path / "cache")
    weights(source, RTN(GRID))  # another solver and other bits
    assert len(kept()) == 3
    task, ran = task_of("llama"), []
    for index, block in enumerate(task.blocks):
        block.mlp.register_forward_hook(lambda _, x, y, i=index: ran.append((i, len(x[0]))))
    torch.testing.assert_close(weights(source, solver, task=task), expected, rtol=0, atol=0)
    assert ran == [(0, 1)]  # one sequence shows what a block returns
    assert len(kept()) == 3
    cache.main(["--prune", "--kind", KIND, "--older", "0s"])
    assert not kept()


def test_what_makes_no_difference_at_float_weights_is_shared_and_what_does_is_not():
    weights(Layerwise(), RTN(GRID))
    weights(Layerwise(sequential=False, memory=1.0), RTN(GRID))
    assert len(kept()) == 3
    weights(Layerwise(), RTN(GRID), chunk=1)  # another order of summation
    assert len(kept()) == 6
    for source in (OutputAdaptive(), OutputAdaptive(schedule="every_k", k=2, memory=1.0)):
        weights(source, RTN(GRID))
        assert len(kept()) == 9
    weights(OutputAdaptive(labels="sampled"), RTN(GRID))
    weights(TokenWeighted(), RTN(GRID))
    assert len(kept()) == 15
    other = task_of("llama")
    other.model.config.rope_parameters["rope_theta"] = 77.0  # nothing of it is in the weights
    weights(Layerwise(), RTN(GRID), task=other)
    assert len(kept()) == 18


@pytest.mark.parametrize("writable", [True, False])
@pytest.mark.parametrize("source", [Layerwise, OutputAdaptive])
def test_what_waits_on_disk_is_what_memory_would_hold(source, writable, monkeypatch, tmp_path):
    if not writable:
        monkeypatch.setattr(Cache, "put", lambda *_: False)
    found, held = [], []
    for memory in (8.0, 1e-9):
        monkeypatch.setenv("QEXP_CACHE_DIR", str(tmp_path / str(memory)))
        found.append(weights(source(memory=memory)))
        shared = AtFloatWeights(source(memory=memory))
        first = next(iter(walk(task_of("llama"), [joined("llama")])))
        held.append(len(shared.prepare(first).held))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert held[0] > 0 and held[1] == (0 if writable else held[0])


def test_a_damaged_entry_alone_is_measured_again():
    expected = weights(Layerwise())
    damaged = kept()[1].path
    damaged.write_bytes(damaged.read_bytes()[:-4])
    before = {entry.path: entry.path.read_bytes() for entry in kept()}
    torch.testing.assert_close(weights(Layerwise()), expected, rtol=0, atol=0)
    changed = [path for path, content in before.items() if path.read_bytes() != content]
    assert changed == [damaged]


def test_entries_that_go_before_they_are_used_end_the_run():
    source = AtFloatWeights(Layerwise(memory=1e-9))
    for block in walk(task_of("llama"), [joined("llama")]):
        if block.index == 0:
            for_each_group = source.prepare(block)
        if block.index == 1:
            for entry in kept():
                entry.path.unlink()
            with pytest.raises(UserError, match=r"model\.layers\.1: its Hessians went"):
                for_each_group(block, lambda *_: None)
            break
        for_each_group(block, lambda *_: None)
