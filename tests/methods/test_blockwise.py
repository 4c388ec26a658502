"""Methods on whole models: propagation, stacking, order of groups, guards."""

import pytest
import torch
from helpers.models import joined, task_of

from qexp.common.errors import UserError
from qexp.grid import IntGrid
from qexp.hessian import Layerwise
from qexp.methods.blockwise import Blockwise, Direct
from qexp.methods.write_back import write
from qexp.solvers import GPTQ, Solution
from qexp.solvers.rtn import RTN

GRID = IntGrid(3, group_size=32)


def total(records) -> tuple[float, float]:
    return sum(r.error for r in records), sum(r.error_before for r in records)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "gpt_neox", "gemma3", "bert", "vit"])
def test_gptq_beats_rounding_and_chunks_change_nothing(family):
    totals = []
    for chunk in (None, 1):
        task = task_of(family)
        method = Blockwise(GPTQ(GRID), Layerwise(), chunk=chunk)
        records = method(task, lambda: [joined(family)])
        after, before = total(records)
        assert after < 0.8 * before
        assert len(records) == len(task.blocks) * sum(len(g.linears) for g in task.arch.groups)
        totals.append(after)
    # A weight on the edge between two codes may fall to either side, and others follow it.
    assert totals[0] == pytest.approx(totals[1], rel=0.02)


def test_rtn_is_the_grid_itself_and_leaves_the_rest_alone():
    task, plain = task_of("llama"), task_of("llama")
    Direct(RTN(GRID))(task, lambda: pytest.fail("RTN asks for no data"))
    for (name, new), old in zip(task.named_parameters(), plain.parameters(), strict=True):
        inside = any(part in name for part in ("proj",))
        torch.testing.assert_close(new, GRID(old.data) if inside else old, atol=0, rtol=0)


@pytest.mark.parametrize("sequential", [True, False])
def test_without_propagation_every_hessian_is_the_float_models(sequential):
    seen: dict[str, torch.Tensor] = {}

    class Spy(GPTQ):
        def __call__(self, weight, hessian):
            seen[len(seen)] = hessian
            return super().__call__(weight, hessian)

    task = task_of("llama")
    Blockwise(Spy(GRID), Layerwise(sequential), propagate=False)(task, lambda: [joined("llama")])
    floats = task_of("llama")
    from qexp.walk import walk

    expected = []
    for block in walk(floats, [joined("llama")]):
        hessians = Layerwise()(block)
        expected += [hessians[group.linears[0]] for group in block.groups]
    torch.testing.assert_close(list(seen.values()), expected)


def test_stacked_matrices_are_solved_as_each_alone():
    class Alone(GPTQ):
        rowwise = False

    results = []
    for solver in (GPTQ(GRID), Alone(GRID)):
        task = task_of("llama")
        Blockwise(solver, Layerwise())(task, lambda: [joined("llama")])
        results.append(torch.cat([p.flatten() for p in task.blocks.parameters()]))
    torch.testing.assert_close(*results)


def test_a_solution_worse_than_rounding_is_an_error_with_the_layers_name():
    linear = torch.nn.Linear(32, 4, bias=False)
    weight = linear.weight.detach()
    nearest = RTN(IntGrid(8))(weight)
    bad = RTN(IntGrid(2))(weight)
    with pytest.raises(RuntimeError, match=r"layer\.x: the calibrated error"):
        write("layer.x", linear, bad, nearest.weight, None, 0.0)
    with pytest.raises(RuntimeError, match="not those that storage gives back"):
        shifted = Solution(nearest.weight + 1e-3, nearest.bits, nearest.packed)
        write("layer.x", linear, shifted, nearest.weight, None, 0.0)


def test_damaged_weights_and_shapes_are_refused_by_name():
    task = task_of("llama")
    with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn\.q_proj.*does not divide"):
        Direct(RTN(IntGrid(4, group_size=48)))(task, list)
    task.blocks[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    for method in (Direct(RTN(GRID)), Blockwise(GPTQ(GRID), Layerwise())):
        with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.down_proj.*not finite"):
            method(task, lambda: [joined("llama")])


def test_a_hessian_that_is_not_finite_names_the_layer():
    task = task_of("llama")
    task.blocks[0].input_layernorm.weight.data[0] = torch.inf
    with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn\.q_proj.*not finite"):
        Blockwise(GPTQ(GRID), Layerwise())(task, lambda: [joined("llama")])
