"""Objectives by hand: what is compared with what, in which direction."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from helpers.models import batches, task_of
from helpers.training import METHOD
from transformers.modeling_outputs import CausalLMOutput

from qexp.common.errors import FieldError, UserError
from qexp.training.augmentation import Augmented
from qexp.training.losses import ConfidenceKL, CrossEntropy, HiddenL2, LogitKL


def test_the_divergence_is_from_the_float_model():
    """KL(float || quantized), the mean over positions: where the float model is sure, it weighs."""
    own, other = torch.randn(2, 2, 3, 5, generator=torch.Generator().manual_seed(0)) * 3
    p, q = other.softmax(-1), own.softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean()
    made = LogitKL().distance(CausalLMOutput(logits=own), CausalLMOutput(logits=other))
    torch.testing.assert_close(made, expected)
    back = LogitKL().distance(CausalLMOutput(logits=other), CausalLMOutput(logits=own))
    assert abs(float(back - made)) > 0.1


def test_hidden_states_are_compared_block_by_block():
    """Shares of the float model's square, the mean over blocks; embeddings are no block."""
    shape = (1, 2, 4)
    other = (torch.zeros(shape), torch.full(shape, 2.0), torch.full(shape, 10.0))
    own = (torch.ones(shape), torch.full(shape, 3.0), torch.full(shape, 10.0))
    made = HiddenL2().distance(
        CausalLMOutput(hidden_states=own), CausalLMOutput(hidden_states=other)
    )
    assert float(made) == pytest.approx((1 / 4 + 0) / 2)


@pytest.mark.parametrize("kind", [LogitKL, HiddenL2])
def test_the_task_s_own_loss_stands_beside_with_its_weight(kind):
    task, batch = task_of(), batches("llama", 1)[0]
    teacher = copy.deepcopy(task.model)
    with torch.no_grad():
        plain = float(task.loss(batch))
        assert float(kind()(task, teacher, batch)) == pytest.approx(0, abs=1e-6)
        assert float(kind(task=0.5)(task, teacher, batch)) == pytest.approx(plain / 2, rel=1e-5)
    with pytest.raises(FieldError, match=r"^task=-1\.0: give a finite number"):
        kind(task=-1.0)


def test_images_alone_are_augmented():
    Augmented().check(task_of("vit"))
    CrossEntropy().check(task_of())
    asked: list[int] = []
    with pytest.raises(UserError, match=r"^method\.loss: augmentation .*causal_lm"):
        replace(METHOD, loss=Augmented())(task_of(), lambda: asked.append(1) or batches("llama"))
    assert not asked


@pytest.mark.parametrize("teacher", ["start", "source"])
def test_the_teacher_is_the_model_at_the_start_or_its_source(teacher):
    seen = []

    @dataclass(frozen=True)
    class Watched(LogitKL):
        def __call__(self, task, teacher, batch):
            seen.append(teacher)
            return super().__call__(task, teacher, batch)

    source, task = task_of(), task_of()
    task.original = lambda: source.model
    for linear in task.linears().values():  # a transform that changes the function
        linear.weight.data += 0.01
    start = copy.deepcopy(task.model)
    method = replace(METHOD, weight=None, loss=Watched(), teacher=teacher)
    method(task, lambda: batches("llama", 1))
    expected = {"start": start, "source": source.model}[teacher].state_dict()
    for name, tensor in seen[0].state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_a_teacher_that_is_not_there_is_refused():
    with pytest.raises(FieldError, match=r"^teacher=source: CrossEntropy compares with no model"):
        replace(METHOD, teacher="source")
    with pytest.raises(FieldError, match=r"^teacher=other is unknown: give start or source"):
        replace(METHOD, teacher="other")
    method = replace(METHOD, loss=LogitKL(), teacher="source")
    with pytest.raises(UserError, match=r"method\.teacher=source: this task was not loaded"):
        method(task_of(), lambda: batches("llama", 1))


def pair() -> tuple[CausalLMOutput, CausalLMOutput]:
    own, other = torch.randn(2, 2, 3, 5, generator=torch.Generator().manual_seed(0)) * 3
    return CausalLMOutput(logits=own), CausalLMOutput(logits=other)


def test_confidence_mixes_both_divergences():
    """BitDistiller: 0 is the forward divergence, 1 the reverse one, bit for bit."""
    own, other = pair()
    forward, reverse = LogitKL().distance(own, other), LogitKL().distance(other, own)
    assert torch.equal(ConfidenceKL(confidence=0).distance(own, other), forward)
    assert torch.equal(ConfidenceKL(confidence=1).distance(own, other), reverse)
    mixed = ConfidenceKL(confidence=0.3).distance(own, other)
    torch.testing.assert_close(mixed, 0.3 * reverse + 0.7 * forward)


def test_equal_models_have_no_loss_and_no_gradient():
    own, _ = pair()
    leaf = own.logits.clone().requires_grad_()
    loss = ConfidenceKL(confidence=0.4).distance(CausalLMOutput(logits=leaf), own)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    assert float(leaf.grad.abs().max()) < 1e-6


def test_close_models_have_equal_divergences():
    own, _ = pair()
    near = CausalLMOutput(logits=own.logits + 0.01 * torch.randn(2, 3, 5))
    forward, reverse = (ConfidenceKL(confidence=m).distance(near, own) for m in (0, 1))
    assert float(forward / reverse) == pytest.approx(1, abs=0.03)


def test_confidence_is_that_of_the_float_model():
    task, data = task_of(), batches("llama", 3)
    loss = ConfidenceKL(sequences=3).fitted(task.model, data)
    with torch.no_grad():
        rows = torch.cat([batch["input_ids"] for batch in data])[:3]
        expected = float(task.model(rows).logits.softmax(-1).amax(-1).double().mean())
    assert loss.confidence == pytest.approx(expected, rel=1e-6)
    assert ConfidenceKL(confidence=0.5).fitted(None, data).confidence == 0.5
    with pytest.raises(FieldError, match=r"^confidence=2: give a number from 0 to 1"):
        ConfidenceKL(confidence=2)
