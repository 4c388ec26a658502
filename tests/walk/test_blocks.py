"""The walk: what reaches a block, and what its changes do downstream, for every family."""

import pytest
import torch
from helpers.models import FAMILIES, block_outputs, joined, task_of

from qexp.common.errors import UserError
from qexp.hessian import Layerwise, second_moment
from qexp.walk import walk

OBJECTIVE = {"bert": "masked_lm", "vit": "image_classification"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [None, 1])
def test_a_walk_that_changes_nothing_is_a_plain_forward(family, chunk):
    task, batch = task_of(family), joined(family)
    expected = block_outputs(task, batch)
    for block, outputs in zip(walk(task, [batch], chunk), expected, strict=True):
        torch.testing.assert_close(torch.cat(list(block.outputs())), outputs)
    torch.testing.assert_close(block_outputs(task, batch), expected, atol=0, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_from_a_block_on_are_the_models(family):
    task, batch = task_of(family), joined(family)
    with torch.no_grad():
        expected = [
            task.loss({key: value[n : n + 1] for key, value in batch.items()})
            for n in range(len(next(iter(batch.values()))))
        ]
    for block in walk(task, [batch]):
        losses = [loss for loss, _ in block.losses()]
        torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_is_shown_its_input_and_changes_are_felt(family):
    """With one piece or several, replaced weights reach the later groups of the same block."""
    hessians = []
    for chunk in (None, 1):
        task, seen = task_of(family), {}
        for block in walk(task, [joined(family)], chunk):

            def visit(names, inputs, seen=seen, linears=block.linears):
                seen[names] = second_moment(inputs)
                for name in names:
                    linears[name].weight.data *= 0.5

            block.advance(visit)
            assert set(block.linears) == {name for names in seen for name in names}
        hessians.append(seen)
    for names, hessian in hessians[0].items():
        torch.testing.assert_close(hessian, hessians[1][names])


@pytest.mark.parametrize("chunk", [None, 1])
def test_the_forward_that_shows_inputs_is_the_only_one(chunk):
    task, batch, runs = task_of("llama"), joined("llama"), []
    for block in task.blocks:
        block.mlp.register_forward_hook(lambda *_: runs.append(1))
    for block in walk(task, [batch], chunk):
        block.advance(lambda names, inputs: None)  # reads no inputs
        chunks = len(block.chunks)
    # One per block and chunk, and the one sequence that shows what a block returns.
    assert len(runs) == 1 + chunks * len(task.blocks)


@pytest.mark.parametrize("together", [True, False])
def test_a_forward_that_shows_inputs_ends_where_the_last_is_known(together, monkeypatch):
    """Also where the passes cannot wait for each other: then each group has one of its own."""
    monkeypatch.setattr("qexp.walk.memory.can_wait", lambda *_: together)
    task, batch, attentions, runs = task_of("llama"), joined("llama"), [], []
    task.blocks[0].self_attn.register_forward_hook(lambda *_: attentions.append(1))
    task.blocks[0].mlp.register_forward_hook(lambda *_: runs.append(1))
    block = next(walk(task, [batch], 1))
    attentions.clear()
    runs.clear()
    block.observe(lambda names, inputs: list(inputs))
    assert not runs  # down_proj is the last group, and its input lies inside the MLP
    # The input of o_proj is inside attention, those of gate and down are behind it.
    assert len(attentions) == len(block.chunks) * (1 if together else 2)
    assert len(list(block.outputs())) == len(block.chunks) == len(runs)


def test_inputs_are_the_same_where_passes_wait_and_where_they_do_not(monkeypatch):
    def visited(together):
        monkeypatch.setattr("qexp.walk.memory.can_wait", lambda *_: together)
        task, seen = task_of("llama"), []
        for block in walk(task, [joined("llama")], 1):

            def visit(names, inputs, block=block):
                seen.extend(x.clone() for x in inputs)
                for name in names:
                    block.linears[name].weight.data *= 0.5

            block.advance(visit)
            seen.extend(block.settled)
        return seen

    for one, other in zip(visited(True), visited(False), strict=True):
        assert torch.equal(one, other)


def test_an_error_in_the_middle_leaves_the_model_as_it_was():
    task, batch = task_of("llama"), joined("llama")
    expected = block_outputs(task, batch)

    def fail(names, inputs):
        if "mlp.gate_proj" in names:
            next(inputs)
            raise UserError("enough of it")

    with pytest.raises(UserError, match="enough of it"):
        next(walk(task, [batch], 1)).advance(fail)
    torch.testing.assert_close(block_outputs(task, batch), expected, atol=0, rtol=0)


def test_looking_onward_leaves_the_walk_where_it_is():
    task, batch = task_of("llama"), joined("llama")
    expected = block_outputs(task, batch)
    for block in walk(task, [batch], 2):
        for later in block.onward():
            torch.testing.assert_close(torch.cat(list(later.outputs())), expected[later.index])
            later.settle([torch.zeros_like(hidden) for hidden in later.inputs])
            break
        assert [later.index for later in block.onward()] == list(range(block.index, 3))
        torch.testing.assert_close(torch.cat(list(block.outputs())), expected[block.index])


def test_second_moment_is_the_mean_outer_product():
    x = torch.randn(3, 7, 200, generator=torch.Generator().manual_seed(0))
    rows = x.reshape(-1, 200).double()
    expected = (2 / 21 * rows.T @ rows).float()
    torch.testing.assert_close(second_moment([x]), expected)
    torch.testing.assert_close(second_moment(list(x)), expected)


def test_layerwise_hessian_of_a_shared_input_is_shared_and_leaves_the_walk_free():
    task, batch = task_of("llama"), joined("llama")
    expected = block_outputs(task, batch)
    for index, block in enumerate(walk(task, [batch])):
        torch.testing.assert_close(torch.cat(block.inputs), expected[index - 1]) if index else None
        hessians = Layerwise()(block)
        assert hessians["self_attn.q_proj"] is hessians["self_attn.k_proj"]
        if index == 0:
            block.module.mlp.down_proj.weight.data.zero_()  # must reach the next block
            expected = block_outputs(task, batch)


def test_sequences_that_do_not_fit_the_memory_run_in_parts(monkeypatch):
    expected = block_outputs(task_of("llama"), joined("llama"))
    monkeypatch.setattr("qexp.walk.memory.free", lambda device: 200_000)
    for block, outputs in zip(walk(task_of("llama"), [joined("llama")]), expected, strict=True):
        assert len(block.chunks) > 1
        torch.testing.assert_close(torch.cat(list(block.outputs())), outputs)


def test_replays_build_no_graph_even_where_gradients_are_on():
    for block in walk(task_of("llama"), [joined("llama")]):
        block.advance(lambda names, inputs: None)
        assert not block.settled[0].requires_grad and block.settled[0].grad_fn is None


def test_a_walk_without_sequences_is_refused():
    with pytest.raises(UserError, match="calibration: there are no sequences"):
        next(walk(task_of("llama"), []))
