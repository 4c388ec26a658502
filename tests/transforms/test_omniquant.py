"""OmniQuant: learned ends are those that the solver finds again; scales change no logit."""

from dataclasses import replace

import pytest
import torch
from helpers.channels import ALL, NORMS, TENSOR, close, drift, logits, planted
from helpers.models import FAMILIES, joined, task_of

from qexp.common.errors import UserError
from qexp.grid import IntGrid, LevelGrid
from qexp.methods.blockwise import Direct
from qexp.quantizers.scheme import FloatActivations
from qexp.solvers.rtn import RTN
from qexp.transforms.learned_scales import Clipping
from qexp.transforms.omniquant import OmniQuant
from qexp.transforms.query_key import query_keys
from qexp.transforms.reconstruction import Reconstruction
from qexp.walk import walk

GRID = IntGrid(3, group_size=32)


@pytest.mark.parametrize(
    "grid",
    [
        GRID,
        IntGrid(3),
        IntGrid(4, symmetric=True),
        IntGrid(4, per_tensor=True),
        IntGrid(4, symmetric=True, per_tensor=True),
        LevelGrid("nf4", group_size=32),
        LevelGrid("e4m3", per_tensor=True),
    ],
    ids=str,
)
def test_a_clamped_weight_rounds_to_what_was_learned(grid):
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    clip = Clipping(grid, weight)
    for parameter in clip.parameters():
        parameter.data -= 3 * torch.rand_like(parameter)
    moved = (grid(clip.clamp(weight)) - clip(weight).detach()).abs() > 1e-5
    # The ends of the symmetric grid lie between two codes, and a tie may fall to either.
    tied = isinstance(grid, IntGrid) and grid.symmetric
    assert float(moved.float().mean()) <= (0.01 if tied else 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_scales_and_shifts_alone_change_no_logit(family):
    """But for the two per cent that sigmoid(4) clips off the largest weights."""
    sites = ALL if family == "bert" else NORMS
    task, batch = task_of(family), joined(family)
    expected = logits(task, batch)
    step = OmniQuant(IntGrid(16), TENSOR, sites, epochs=1, clip_rate=0.0)
    names = set(task.state_dict())
    assert step(task, lambda: [batch]) == []
    assert set(task.state_dict()) == names
    assert float((logits(task, batch) - expected).norm() / expected.norm()) < 0.1


@pytest.mark.parametrize(
    ("family", "sites"),
    [("gpt2", None), ("qwen2", None), ("gemma3", NORMS), ("gpt2", NORMS), ("opt", ALL)],
)
def test_rounding_costs_less_after(family, sites):
    batch = joined(family)
    activation, size = (FloatActivations(), 1) if sites is None else (TENSOR, 50)
    expected = logits(planted(family, size), batch)
    errors = []
    for steps in ([], [OmniQuant(GRID, activation, sites, epochs=8)]):
        task = planted(family, size)
        for step in [*steps, Direct(RTN(GRID), [activation])]:
            step(task, lambda: [batch])
        errors.append(drift(task, batch, expected))
    assert errors[1] < errors[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_scale_between_queries_and_keys_changes_no_logit(family):
    task, batch = task_of(family), joined(family)
    expected = logits(task, batch)
    found = [pair for index in range(len(task.blocks)) for pair in query_keys(task, index)]
    fused_or_normed = family in ("gpt2", "gpt_neox", "qwen3", "gemma3")
    assert len(found) == (0 if fused_or_normed else len(task.blocks))
    for pair in found:
        pair.theta.data = torch.randn_like(pair.theta)
        before = pair.queries.producer.weight.detach().clone()
        with pair.live():
            close(logits(task, batch), expected, 1e-4)
            live = pair.queries.producer.weight.detach().clone()
        pair.fold()
        assert torch.equal(pair.queries.producer.weight, live) and not torch.equal(before, live)
    close(logits(task, batch), expected, 1e-4)


def test_a_grid_that_rows_share_feels_the_queries_scale():
    task, batch = task_of("llama"), joined("llama")
    before = task.blocks[0].self_attn.k_proj.weight.detach().clone()
    step = OmniQuant(
        IntGrid(4, per_tensor=True), FloatActivations(), NORMS, epochs=2, clip_rate=0.0
    )
    step(task, lambda: [batch])
    other = task_of("llama")
    replace(step, query_key=False)(other, lambda: [batch])
    keys = [one.blocks[0].self_attn.k_proj.weight for one in (task, other)]
    assert not torch.equal(keys[0], keys[1]) and not torch.equal(keys[1], before)


@pytest.mark.parametrize(
    ("activation", "shift", "moves"),
    [
        (FloatActivations(), None, False),
        (FloatActivations(), True, True),
        (TENSOR, None, True),
        (TENSOR, False, False),
    ],
    ids=["weights alone", "asked for", "activations", "refused"],
)
def test_shifts_are_learned_where_activations_are_quantized(activation, shift, moves):
    """A shift of a norm's channels moves the linears' biases; what weights alone cost does not
    depend on it, and the reference leaves it out there."""
    task = task_of("opt")
    before = task.blocks[0].fc1.bias.clone()
    step = OmniQuant(GRID, activation, NORMS, shift=shift, epochs=1, clip_rate=0.0, scale_rate=0.0)
    step(task, lambda: [joined("opt")])
    assert torch.equal(task.blocks[0].fc1.bias, before) != moves


@torch.no_grad()
def test_targets_add_up():
    block = next(iter(walk(task_of("opt"), [joined("opt")], 2)))
    targets = [list(block.outputs()), block.inputs]
    whole, *parts = (
        Reconstruction(block, block.inputs, each).error(0)
        for each in (targets, targets[:1], targets[1:])
    )
    assert float(parts[0]) == pytest.approx(0, abs=1e-8) and float(whole) > 0
    torch.testing.assert_close(whole, parts[0] + parts[1])
    plain, augmented = task_of("opt"), task_of("opt")
    for task, both in ((plain, False), (augmented, True)):
        OmniQuant(GRID, FloatActivations(), epochs=2, augmented=both)(task, lambda: [joined("opt")])
    assert not torch.equal(plain.blocks[-1].fc1.weight, augmented.blocks[-1].fc1.weight)


@pytest.mark.parametrize("grid", [LevelGrid("nf4", group_size=32), LevelGrid("e4m3")], ids=str)
def test_ends_of_uneven_levels_learn(grid):
    batch = joined("llama")
    expected = logits(planted("llama", 1), batch)
    errors = []
    for steps in ([], [OmniQuant(grid, FloatActivations(), NORMS, epochs=8)]):
        task = planted("llama", 1)
        for step in [*steps, Direct(RTN(grid), [FloatActivations()])]:
            step(task, lambda: [batch])
        errors.append(drift(task, batch, expected))
    assert errors[1] < errors[0]


def test_ends_that_no_gradient_reaches_are_named(monkeypatch):
    forward = Clipping.forward
    monkeypatch.setattr(Clipping, "forward", lambda clip, weight: forward(clip, weight).detach())
    task = task_of("llama").requires_grad_(False)
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.q_proj: ends: .* 0 of 128 values"):
        OmniQuant(GRID, FloatActivations(), epochs=1)(task, lambda: [joined("llama")])


def test_two_levels_of_scales_are_refused():
    with pytest.raises(UserError, match=r"weight\.scales"):
        OmniQuant(IntGrid(3, group_size=16, scales=IntGrid(3, group_size=4)), FloatActivations())
