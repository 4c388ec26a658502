"""Rounding of activations before or after that of weights: what ranges and Hessians see."""

import pytest
import torch
from helpers.hessians import measured
from helpers.models import block_outputs, joined, task_of

from qexp.grid import IntGrid
from qexp.hessian import Layerwise, OutputAdaptive, second_moment
from qexp.methods.blockwise import Blockwise, Direct
from qexp.quantizers.placement import AllOps, KVCache, LinearInputs
from qexp.quantizers.scheme import FloatActivations, QuantizedActivations, quantize_activations
from qexp.solvers import GPTQ
from qexp.solvers.rtn import RTN
from qexp.task import Task
from qexp.walk import walk

pytestmark = pytest.mark.usefixtures("own_cache")


GRID = IntGrid(3, group_size=32)
STATIC = QuantizedActivations(LinearInputs(), IntGrid(4, per_tensor=True))
TOKEN = QuantizedActivations(LinearInputs(), IntGrid(4, symmetric=True), dynamic=True)
KINDS = pytest.mark.parametrize("kind", [STATIC, TOKEN], ids=["static", "token"])


class Spy(GPTQ):
    """Keeps the Hessians that it is given."""

    seen: list[torch.Tensor]

    def __call__(self, weight, hessian):
        self.seen.append(hessian)
        return super().__call__(weight, hessian)


def spied(kind, first: bool, **settings) -> tuple[Task, list[torch.Tensor]]:
    task, solver = task_of("llama"), Spy(GRID)
    object.__setattr__(solver, "seen", [])
    method = Blockwise(solver, Layerwise(), activations=[kind], activations_first=first, **settings)
    method(task, lambda: [joined("llama")])
    return task, solver.seen


def state(task: Task) -> dict[str, torch.Tensor]:
    return task.model.state_dict() | task.quantizers.state_dict()


@torch.no_grad()
def inputs(task: Task) -> list[torch.Tensor]:
    """What the linears read in a plain forward, one tensor per group."""
    seen = []
    handles = [
        block.get_submodule(group.linears[0]).register_forward_pre_hook(
            lambda _, args: seen.append(args[0])
        )
        for block in task.blocks
        for group in task.arch.groups
    ]
    task.encode(joined("llama"))
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(
    "make",
    [
        lambda first: Blockwise(
            GPTQ(GRID), Layerwise(), activations=[FloatActivations()], activations_first=first
        ),
        lambda first: Direct(RTN(GRID), [FloatActivations()], first),
    ],
    ids=["gptq", "rtn"],
)
def test_without_activation_quantizers_the_order_makes_no_difference(make):
    found = []
    for first in (True, False):
        task = task_of("llama")
        make(first)(task, lambda: [joined("llama")])
        found.append(state(task))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@KINDS
def test_the_first_hessian_is_that_of_the_rounded_inputs(kind):
    """By hand: of the float model's first inputs, rounded."""
    plain = inputs(task_of("llama"))[0]
    expected = second_moment([kind.rounded(plain)])
    assert not torch.allclose(expected, second_moment([plain]), rtol=1e-3)
    torch.testing.assert_close(spied(kind, True)[1][0], expected)
    torch.testing.assert_close(spied(kind, False)[1][0], second_moment([plain]))


@KINDS
def test_every_hessian_at_float_weights_is_that_of_the_quantized_forward(kind):
    rounded = task_of("llama")
    quantize_activations(rounded, [kind], lambda: [joined("llama")])
    expected = [second_moment([x]) for x in inputs(rounded)]
    torch.testing.assert_close(spied(kind, True, propagate=False)[1], expected)
    plain = [second_moment([x]) for x in inputs(task_of("llama"))]
    torch.testing.assert_close(spied(kind, False, propagate=False)[1], plain)


@pytest.mark.parametrize("step", ["gptq", "rtn"])
@pytest.mark.parametrize("first", [True, False])
def test_static_ranges_are_those_of_the_model_that_the_order_says(step, first):
    task, batch = task_of("llama"), joined("llama")
    if step == "gptq":
        method = Blockwise(GPTQ(GRID), Layerwise(), activations=[STATIC], activations_first=first)
    else:
        method = Direct(RTN(GRID), [STATIC], first)
    method(task, lambda: [batch])
    ranged = task_of("llama")
    if not first:
        ranged.model.load_state_dict(task.model.state_dict())
    quantize_activations(ranged, [STATIC], lambda: [batch])
    expected = dict(ranged.quantizers.state_dict())
    torch.testing.assert_close(dict(task.quantizers.state_dict()), expected, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_better_order_leaves_smaller_errors_of_the_outputs(dynamic):
    """Of the layers, on the rounded inputs that they read, as shares of the outputs; and of the
    model."""
    grid = IntGrid(3, symmetric=dynamic, per_tensor=not dynamic)
    kind, plain = QuantizedActivations(LinearInputs(), grid, dynamic), task_of("llama")
    exact = plain.encode(joined("llama"))
    rounded = task_of("llama")
    quantize_activations(rounded, [kind], lambda: [joined("llama")])
    read = inputs(rounded)
    layers, model = {}, {}
    for first in (True, False):
        layers[first] = 0.0
        task, _ = spied(kind, first, propagate=False)
        groups = [(n, group) for n in range(len(task.blocks)) for group in task.arch.groups]
        for x, (n, group) in zip(read, groups, strict=True):
            for name in group.linears:
                was, made = (t.blocks[n].get_submodule(name).weight for t in (plain, task))
                error = (x @ (made - was).T).square().sum() / (x @ was.T).square().sum()
                layers[first] += float(error)
        task, _ = spied(kind, first)
        model[first] = float((task.encode(joined("llama")) - exact).square().mean())
    assert layers[True] < 0.95 * layers[False]
    assert model[True] < model[False]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("placement", [LinearInputs(), AllOps(), KVCache()], ids=str)
@pytest.mark.parametrize(
    ("grid", "dynamic"), [(IntGrid(3, per_tensor=True), False), (IntGrid(3, symmetric=True), True)]
)
def test_a_walk_among_quantizers_is_a_plain_forward(family, placement, grid, dynamic):
    task, batch = task_of(family), joined(family)
    quantize_activations(task, [QuantizedActivations(placement, grid, dynamic)], lambda: [batch])
    expected = block_outputs(task, batch)
    loss = task.loss(batch)
    for block, outputs in zip(walk(task, [batch]), expected, strict=True):
        torch.testing.assert_close(torch.cat(list(block.outputs())), outputs)
        torch.testing.assert_close(next(block.losses(len(outputs)))[0], loss)


@pytest.mark.parametrize("placement", [LinearInputs(), AllOps()], ids=str)
@pytest.mark.parametrize("dynamic", [False, True])
def test_gradients_of_the_output_pass_activation_quantizers(placement, dynamic):
    """Sixteen bits leave the Hessians of OAC what they are, and four do not stop them."""
    hessians, batch = [], joined("llama")
    for bits in (None, 16, 4):
        task = task_of("llama")
        if bits is not None:
            grid = IntGrid(bits, symmetric=dynamic, per_tensor=not dynamic)
            quantize_activations(
                task, [QuantizedActivations(placement, grid, dynamic)], lambda: [batch]
            )
            for quantizer in task.quantizers.values():
                quantizer.scale *= 1.01  # of a static range the very ends would be clipped
        hessians.append(measured(task, OutputAdaptive(), [batch]))
    plain, fine, coarse = hessians
    for name, hessian in plain.items():
        assert torch.linalg.norm(fine[name] - hessian) < 0.02 * torch.linalg.norm(hessian)
        assert coarse[name].isfinite().all() and coarse[name].diagonal().sum() > 0


def test_hessians_that_are_kept_are_told_apart_by_the_quantizers():
    """In any order of jobs, each finds those that it would have measured itself."""
    kinds = [
        FloatActivations(),
        STATIC,
        TOKEN,
        QuantizedActivations(LinearInputs(), IntGrid(5, symmetric=True), True),
    ]
    found = [spied(kind, True, propagate=False)[1] for kind in kinds]
    for index, one in enumerate(found):
        for other in found[:index]:
            assert not torch.allclose(one[0], other[0], rtol=1e-4)
    again = [spied(kind, True, propagate=False)[1] for kind in kinds]
    torch.testing.assert_close(again, found, rtol=0, atol=0)


@KINDS
def test_a_killed_run_goes_on_with_the_ranges_that_it_had(monkeypatch, kind):
    method = Blockwise(GPTQ(GRID), Layerwise(), activations=[kind])
    whole = task_of("llama")
    method(whole, lambda: [joined("llama")])
    original, visited = Blockwise._solve, []

    def until(stop: int):
        def solve(self, block, for_each_group):
            if block.index == stop:
                raise KeyboardInterrupt
            visited.append(block.index)
            return original(self, block, for_each_group)

        return solve

    monkeypatch.setattr(Blockwise, "_solve", until(2))
    with pytest.raises(KeyboardInterrupt):
        method(task_of("llama"), lambda: [joined("llama")])
    monkeypatch.setattr(Blockwise, "_solve", until(99))
    resumed = task_of("llama")
    method(resumed, lambda: [joined("llama")])
    assert visited == [0, 1, 2]
    torch.testing.assert_close(state(resumed), state(whole), rtol=0, atol=0)


def test_calibration_text_is_asked_for_once_before_anything_is_rounded():
    """Some recipes let the model write it."""
    for first in (True, False):
        task, asked = task_of("llama"), []
        untouched = state(task_of("llama"))

        def batches(task=task, asked=asked, untouched=untouched):
            asked.append(all(torch.equal(t, untouched[n]) for n, t in state(task).items()))
            return [joined("llama")]

        Blockwise(GPTQ(GRID), Layerwise(), activations=[TOKEN], activations_first=first)(
            task, batches
        )
        assert asked == [True] and task.quantizers
