"""linearize: logits stay, ties stay."""

import pytest
import torch
from helpers.models import FAMILIES, batches, tiny
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from qexp.models.linearize import linearize


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 264}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=256, eos_token_id=257)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def test_linearize_leaves_the_logits_of_gpt2():
    model, [batch] = gpt2().double(), batches("gpt2", count=1)
    before = model(**batch).logits
    after = linearize(model)(**batch).logits
    torch.testing.assert_close(after, before)
    assert not any(isinstance(module, Conv1D) for module in model.modules())
    assert model.lm_head.weight is model.transformer.wte.weight


def test_linearize_keeps_shared_modules_and_shared_weights():
    model = gpt2()
    one, two = model.transformer.h
    two.mlp = one.mlp
    two.attn.c_attn.weight = one.attn.c_attn.weight
    linearize(model)
    assert two.mlp.c_fc is one.mlp.c_fc
    assert two.attn.c_attn is not one.attn.c_attn
    assert two.attn.c_attn.weight is one.attn.c_attn.weight
    assert two.attn.c_attn.bias is not one.attn.c_attn.bias


def test_linearize_handles_a_module_under_two_names():
    model = gpt2()
    model.twice = model.transformer.h[0].mlp.c_fc
    linearize(model)
    assert isinstance(model.twice, nn.Linear)
    assert model.twice is model.transformer.h[0].mlp.c_fc


@pytest.mark.parametrize("family", FAMILIES)
def test_linearize_changes_nothing_twice(family):
    model = tiny(family).model
    modules = dict(model.named_modules())
    linearize(model)
    assert all(module is modules[name] for name, module in model.named_modules())
