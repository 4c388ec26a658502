"""Objectives by hand: what is compared with what, in which direction."""

import copy
from dataclasses import replace

import pytest
import torch
from helpers.models import batches, task_of
from helpers.training import METHOD
from transformers.modeling_outputs import CausalLMOutput

from qexp.common.errors import FieldError, UserError
from qexp.training.augmentation import Augmented
from qexp.training.losses import CrossEntropy, HiddenL2, LogitKL


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
