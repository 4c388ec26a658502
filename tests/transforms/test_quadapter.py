"""Quadapter's first phase: what it learns, what it leaves alone, every family."""

from contextlib import ExitStack
from itertools import count

import pytest
import torch
from helpers.channels import ALL, NORMS, TENSOR, close, drift, every, logits, planted, random_scale
from helpers.models import FAMILIES, joined, task_of

from qexp.common.errors import UserError
from qexp.gradients import Straight
from qexp.grid import IntGrid, LevelGrid
from qexp.methods.blockwise import Direct
from qexp.quantizers.channel_scale import Alpha
from qexp.quantizers.scheme import FloatActivations
from qexp.solvers.rtn import RTN
from qexp.transforms.channels import channels_of
from qexp.transforms.quadapter import Quadapter
from qexp.transforms.reconstruction import Reconstruction, quantized
from qexp.walk import walk

GRID = IntGrid(8, symmetric=True, per_tensor=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sites", [NORMS, ALL])
def test_no_logit_changes(family, sites):
    step = Quadapter(GRID, TENSOR, sites, init="smooth", steps=3, batch=2)
    task, batch = task_of(family), joined(family)
    if (family, sites) == ("bert", NORMS):
        with pytest.raises(UserError, match="is post-norm"):
            step(task, lambda: [batch])
        return
    expected = logits(task, batch)
    names = set(task.state_dict())
    assert step(task, lambda: [batch]) == []
    assert set(task.state_dict()) == names
    close(logits(task, batch), expected, 1e-4)


@pytest.mark.parametrize(
    ("family", "init"),
    [
        *((family, "ones") for family in ("gpt2", "llama", "gpt_neox", "vit")),
        *((family, "smooth") for family in ("opt", "gemma3")),
    ],
)
def test_planted_outliers_cost_less_after(family, init):
    batch = joined(family)
    expected = logits(planted(family), batch)
    errors = []
    step = Quadapter(GRID, TENSOR, init=init, steps=30, batch=2, rate=0.1)
    for steps in ([], [step]):
        task = planted(family)
        for each in [*steps, Direct(RTN(GRID), [TENSOR])]:
            each(task, lambda: [batch])
        errors.append(drift(task, batch, expected))
    assert errors[1] < 0.3 * errors[0]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_live_with_quantizers_is_folded_with_quantizers(family):
    """Rounding is that of the folded weight, so that what is learned is what is deployed."""
    task = task_of(family)
    for block in walk(task, [joined(family)], 2):
        sites = channels_of(task, block.index, ALL)
        scales = [random_scale(channels, n) for n, channels in enumerate(sites)]
        rules = dict.fromkeys(block.linears, lambda w: GRID(w.float(), Straight()))
        with ExitStack() as stack:
            for channels, scale in zip(sites, scales, strict=True):
                stack.enter_context(channels.live(lambda scale=scale: scale))
            stack.enter_context(quantized(block, rules, TENSOR))
            live = block.replay(0, block.inputs[0])
        for channels, scale in zip(sites, scales, strict=True):
            channels.fold(scale)
        with quantized(block, rules, TENSOR):
            assert torch.equal(block.replay(0, block.inputs[0]), live)
        break


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_alpha_of_one_is_the_plain_quantizer(family):
    task, batch = task_of(family), joined(family)
    block = next(iter(walk(task, [batch], 2)))
    rules = dict.fromkeys(block.linears, lambda w: GRID(w.float(), Straight()))
    unrounded = block.replay(0, block.inputs[0])
    with quantized(block, rules, TENSOR):
        plain = block.replay(0, block.inputs[0])
        with channels_of(task, 0, ALL)[0].live(lambda: torch.ones(64)):
            assert torch.equal(block.replay(0, block.inputs[0]), plain)
        for linear in block.linears.values():
            weight = linear.parametrizations.weight.original
            assert torch.equal(linear.weight, GRID(weight))
    assert torch.equal(block.replay(0, block.inputs[0]), unrounded)


def test_theta_has_the_gradient_of_the_papers_formula():
    """d Q(alpha x) / alpha / d alpha = -(Q(alpha x) - alpha x) / alpha^2 with the range held."""
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    alpha = torch.full((6,), 1.3, requires_grad=True)
    grid = IntGrid(4, per_tensor=True)
    q = grid.fit(1.5 * x)  # nothing is clipped
    rounded = grid.round(alpha * x, q, Straight())
    (rounded / alpha).sum().backward()
    expected = (-(rounded - alpha * x) / alpha**2).sum(0)
    torch.testing.assert_close(alpha.grad, expected.detach(), rtol=1e-4, atol=1e-4)


def test_a_steep_loss_does_not_overflow_in_the_scales_dtype():
    grid = IntGrid(8, symmetric=True, scale_dtype="float16")
    theta = torch.zeros(6, requires_grad=True)
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    (1e9 * grid(x * theta.exp(), Straight()).square().sum()).backward()
    assert theta.grad is not None and theta.grad.isfinite().all()


def test_a_block_that_gains_nothing_keeps_alpha_at_one(monkeypatch):
    errors = count()  # each block's error after learning is above that with alpha = 1
    monkeypatch.setattr(Reconstruction, "total", lambda _: float(next(errors)))
    task, batch = task_of("llama"), joined("llama")
    before = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    Quadapter(GRID, FloatActivations(), steps=5, batch=4)(task, lambda: [batch])
    assert next(errors) == 2 * len(task.blocks)
    for name, tensor in task.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_the_error_of_every_block_falls_and_weights_need_no_gradient():
    batch = joined("opt")
    rules = {}
    for step in (None, Quadapter(GRID, TENSOR, steps=20, batch=2, rate=0.1)):
        task = planted("opt")
        if step is not None:
            step(task, lambda: [batch])
            assert all(p.grad is None for p in task.parameters())
        errors = []
        for block in walk(task, [batch], 2):
            targets = list(block.outputs())
            names = dict.fromkeys(block.linears, lambda w: GRID(w.float(), Straight()))
            with quantized(block, names, TENSOR):
                errors.append(Reconstruction(block, block.inputs, [targets]).total())
        rules[step is None] = errors
    assert all(a < b for a, b in zip(rules[False], rules[True], strict=True))


def test_a_start_that_is_unknown_is_refused():
    with pytest.raises(UserError, match="ones or smooth"):
        Quadapter(GRID, TENSOR, init="awq")
    assert len(every(task_of("gpt2"), NORMS)) == 6


LEVELS = [LevelGrid("nf4", group_size=32), LevelGrid("e4m3", per_tensor=True)]


@pytest.mark.parametrize("grid", LEVELS, ids=str)
def test_weights_on_uneven_levels_have_a_gradient(grid):
    block = next(iter(walk(task_of("llama"), [joined("llama")], 2)))
    targets = [output.clone() for output in block.outputs()]
    rules = dict.fromkeys(block.linears, lambda w: grid(w.float(), Straight()))
    with quantized(block, rules, FloatActivations()), torch.enable_grad():
        weights = [linear.parametrizations.weight.original for linear in block.linears.values()]
        for weight in weights:
            weight.requires_grad_()
        error = Reconstruction(block, block.inputs, [targets]).error(0)
        for gradient in torch.autograd.grad(error, weights):
            assert float((gradient != 0).float().mean()) > 0.95


@pytest.mark.parametrize("grid", LEVELS, ids=str)
def test_the_error_on_uneven_levels_falls(grid):
    batch, errors = joined("opt"), []
    for steps in (0, 20):
        task = planted("opt")
        Quadapter(grid, TENSOR, steps=steps, batch=2, rate=0.1)(task, lambda: [batch])
        block = next(iter(walk(task, [batch], 2)))
        targets = list(block.outputs())
        rules = dict.fromkeys(block.linears, lambda w: grid(w.float(), Straight()))
        with quantized(block, rules, TENSOR):
            errors.append(Reconstruction(block, block.inputs, [targets]).total())
    assert errors[1] < errors[0]


def without_gradient(monkeypatch, share: float) -> None:
    """Let nothing reach the first channels of alpha."""

    def forward(alpha):
        cut = int(share * len(alpha.theta))
        return torch.cat([alpha.theta[:cut].detach(), alpha.theta[cut:]]).neg().exp()

    monkeypatch.setattr(Alpha, "forward", forward)


def test_scales_that_no_gradient_reaches_are_named(monkeypatch):
    step, batch = Quadapter(GRID, FloatActivations(), steps=5, batch=2), joined("llama")
    without_gradient(monkeypatch, 0.3)  # as dead channels are
    step(task_of("llama"), lambda: [batch])
    for share in (0.6, 1.0):
        without_gradient(monkeypatch, share)
        with pytest.raises(UserError, match=r"layers\.0\.input_layernorm: alpha.* of 64 values"):
            step(task_of("llama"), lambda: [batch])
