"""Rotations: orthogonal, the same function, outliers spread; every family that allows it."""

import pytest
import torch
from helpers.channels import TENSOR, close, drift, logits, planted
from helpers.models import FAMILIES, joined, task_of

from qexp.common.errors import UserError
from qexp.grid import IntGrid
from qexp.methods.blockwise import Direct
from qexp.solvers.rtn import RTN
from qexp.transforms.rotate import Rotate, rotation

ROTATED = [family for family in FAMILIES if family not in ("bert", "gemma3")]


@pytest.mark.parametrize("kind", ["hadamard", "random"])
@pytest.mark.parametrize("width", [1, 7, 64, 96, 576])
def test_a_rotation_is_orthogonal_and_fixes_the_ones(kind, width):
    q = rotation(width, kind, torch.Generator().manual_seed(0))
    eye = torch.eye(width, dtype=torch.float64)
    torch.testing.assert_close(q @ q.T, eye)
    torch.testing.assert_close(q.sum(1), torch.ones(width, dtype=torch.float64))


def test_a_hadamard_rotation_spreads_every_channel():
    q = rotation(64, "hadamard", torch.Generator().manual_seed(0))
    assert float(q.abs().max()) < 0.5  # a channel alone would be 1, an even spread is 0.125


@pytest.mark.parametrize("family", ROTATED)
@pytest.mark.parametrize("kind", ["hadamard", "random"])
@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1e-4), (torch.float64, 1e-6)])
def test_no_logit_changes(family, kind, dtype, share):
    task, batch = task_of(family).to(dtype), joined(family)
    task.blocks[0].get_submodule(task.arch.norms[0]).weight.data[5] = -float(task.arch.unit_offset)
    expected = logits(task, batch)
    first = task.blocks[0].get_submodule(task.arch.groups[0].linears[0]).weight.clone()
    Rotate(kind)(task, lambda: pytest.fail("no data is asked for"))
    close(logits(task, batch), expected, share)
    after = task.blocks[0].get_submodule(task.arch.groups[0].linears[0]).weight
    assert float((after - first).detach().norm()) > 0.1


def test_identity_folds_norms_and_rotates_nothing():
    task, batch = task_of("llama"), joined("llama")
    block, arch = task.blocks[0], task.arch
    block.get_submodule(arch.norms[0]).weight.data.uniform_(0.5, 2)
    gain = block.get_submodule(arch.norms[0]).weight.clone()
    queries = block.self_attn.q_proj.weight.clone()
    kept = {name: block.get_submodule(name).weight.clone() for name in arch.writers}
    embedding = task.model.model.embed_tokens.weight.clone()
    expected = logits(task, batch)
    Rotate("identity")(task, lambda: pytest.fail("no data is asked for"))
    close(logits(task, batch), expected, 1e-5)
    assert torch.equal(task.model.model.embed_tokens.weight, embedding)
    assert all(torch.equal(block.get_submodule(name).weight, kept[name]) for name in kept)
    torch.testing.assert_close(block.self_attn.q_proj.weight, queries * gain)
    assert (block.get_submodule(arch.norms[0]).weight == 1).all()


def test_a_shared_embedding_is_shared_no_longer():
    task = task_of("gpt2")
    assert task.model.lm_head.weight is task.model.transformer.wte.weight
    Rotate()(task, lambda: [])
    assert task.model.lm_head.weight is not task.model.transformer.wte.weight


@pytest.mark.parametrize("family", ["bert", "gemma3"])
def test_families_that_norm_what_is_written_are_refused(family):
    with pytest.raises(UserError, match="norms between"):
        Rotate()(task_of(family), lambda: [])
    with pytest.raises(UserError, match="hadamard, random or identity"):
        Rotate("givens")


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "gpt_neox", "vit"])
def test_planted_outliers_cost_less_after(family):
    batch = joined(family)
    expected = logits(planted(family), batch)
    errors = []
    for steps in ([], [Rotate()]):
        task = planted(family)
        for step in [*steps, Direct(RTN(IntGrid(8)), [TENSOR])]:
            step(task, lambda: [batch])
        errors.append(drift(task, batch, expected))
    assert errors[1] < 0.2 * errors[0]
