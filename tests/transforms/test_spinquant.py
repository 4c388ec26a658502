"""SpinQuant: its rotations stay orthogonal, and without a step are QuaRot's."""

import pytest
import torch
from helpers.channels import close, logits
from helpers.models import joined, task_of

from qexp.common.errors import UserError
from qexp.grid import IntGrid
from qexp.quantizers.placement import KVCache, LinearInputs
from qexp.quantizers.scheme import FloatActivations, QuantizedActivations
from qexp.training.losses import CrossEntropy
from qexp.training.optimizer import CayleySGD
from qexp.training.trainer import Trainer
from qexp.transforms.reconstruction import rounded_inputs
from qexp.transforms.rotate import ONLINE, Rotate, fold_norms, rotation, seeded, untie
from qexp.transforms.spinquant import Rotation, SpinQuant, turned

NARROW = IntGrid(4, symmetric=True, narrow=True)
TOKEN = QuantizedActivations(LinearInputs(), NARROW, dynamic=True)
CACHE = QuantizedActivations(KVCache(), IntGrid(4), dynamic=True)
ALL = Rotate(values=True, online=ONLINE)


def spin(rate: float = 1.5, steps: int = 6, **fields) -> SpinQuant:
    given = {"activation": TOKEN, "kv": CACHE} | fields
    trainer = Trainer(steps=steps, sequences=2, every=3)
    parts = {"loss": CrossEntropy(), "optimizer": CayleySGD(rate), "trainer": trainer}
    return SpinQuant(ALL, NARROW, **parts, **given)


def rounded_loss(task, batch) -> float:
    with torch.no_grad():
        contexts = [rounded_inputs(task, block, TOKEN) for block in range(len(task.blocks))]
        for context in contexts:
            context.__enter__()
        loss = float(task.loss(batch))
        for context in contexts:
            context.__exit__(None, None, None)
    return loss


@pytest.mark.parametrize(
    "family", ["gpt2", "opt", "llama", "mistral", "qwen2", "qwen3", "gpt_neox"]
)
def test_learned_rotations_change_no_logit(family):
    task, batch = task_of(family), joined(family)
    expected = logits(task, batch)
    spin(steps=1)(task, lambda: [batch])
    close(logits(task, batch), expected, 1e-4)
    assert not hasattr(task, "rotations")


def test_without_a_step_they_are_those_of_quarot():
    plain, learned, batch = task_of("llama"), task_of("llama"), joined("llama")
    ALL(plain, lambda: [])
    spin(rate=0.0)(learned, lambda: [batch])
    for (name, one), other in zip(
        plain.model.named_parameters(), learned.model.parameters(), strict=True
    ):
        torch.testing.assert_close(other, one, atol=2e-5, rtol=1e-4, msg=name)


def test_the_loss_of_the_rounded_model_falls():
    batch, losses = joined("llama"), []
    for rate in (0.0, 1.5):
        task = task_of("llama")
        task.blocks[0].input_layernorm.weight.data[5] *= 30
        spin(rate, steps=8, kv=FloatActivations())(task, lambda: [batch])
        losses.append(rounded_loss(task, batch))
    assert losses[1] < losses[0] - 1e-3


@pytest.mark.parametrize("keeps_ones", [False, True])
def test_a_matrix_stays_orthogonal_and_descends(keeps_ones):
    turn = Rotation(rotation(16, "random", seeded(0)), keeps_ones)
    close(turn().detach(), rotation(16, "random", seeded(0)).float(), 1e-6)
    aim = rotation(16, "random", seeded(1)).float()
    optimizer = CayleySGD(1.5).optimizer({"rotations": list(turn.parameters())})
    losses = []
    for _ in range(60):
        loss = (turn() - aim).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    torch.testing.assert_close(turn() @ turn().T, torch.eye(16), atol=1e-5, rtol=0)
    exact = turn.exact()
    torch.testing.assert_close(exact @ exact.T, torch.eye(16).double(), atol=1e-12, rtol=0)
    assert losses[-1] < 0.5 * losses[0]
    if keeps_ones:
        torch.testing.assert_close(turn().sum(1), torch.ones(16), atol=1e-5, rtol=0)


def test_without_quantizers_the_loss_does_not_depend_on_them():
    task, batch = task_of("llama"), joined("llama")
    untie(task)
    with torch.no_grad():
        fold_norms(task)
        expected = task.loss(batch)
    stream = Rotation(rotation(64, "hadamard", seeded(0)), keeps_ones=True)
    values = [Rotation(rotation(16, "random", seeded(n)), keeps_ones=False) for n in range(3)]
    with turned(task, stream, values):
        loss = task.loss(batch)
        gradients = torch.autograd.grad(loss, [stream.inner, *(each.inner for each in values)])
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    for rotated, gradient in zip([stream, *values], gradients, strict=True):
        skew = gradient @ rotated.inner.T - rotated.inner @ gradient.T  # along rotations
        assert float(skew.detach().abs().max()) < 1e-5


def test_what_learns_nothing_is_refused():
    with pytest.raises(UserError, match="nothing is rounded"):
        spin(activation=FloatActivations(), kv=FloatActivations())
    assert spin(activation=FloatActivations(), kv=FloatActivations(), round_weights=True)
    with pytest.raises(UserError, match="norms between"):
        spin()(task_of("gemma3"), lambda: pytest.fail("no data is asked for"))
