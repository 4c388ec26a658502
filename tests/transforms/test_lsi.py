"""LSI: increments of zero are OmniQuant bit for bit, and live and folded weights are equal."""

import pytest
import torch
from helpers.channels import logits
from helpers.models import joined, task_of

from qexp.common.errors import UserError
from qexp.grid import IntGrid
from qexp.quantizers.scheme import FloatActivations
from qexp.transforms.omniquant import OmniQuant
from qexp.transforms.singular import Singular


def lsi(**fields) -> OmniQuant:
    return OmniQuant(IntGrid(2), FloatActivations(), **({"epochs": 3} | fields))


def after(family="llama", **fields):
    task, batch = task_of(family), joined(family)
    lsi(**fields)(task, lambda: [batch])
    return task, logits(task, batch)


@pytest.mark.parametrize("sites", [None, "norms+value"])
def test_increments_that_do_not_train_are_omniquant_bit_for_bit(sites):
    plain, still, moved = (after(sites=sites, singular_rate=rate)[1] for rate in (None, 0.0, 1e-3))
    assert torch.equal(plain, still)
    assert not torch.allclose(plain, moved, atol=1e-3)


@pytest.mark.parametrize("square", [0, 5, 500])
def test_folded_weights_are_the_live_ones(square):
    linear = task_of("llama").blocks[0].mlp.up_proj
    before = linear.weight.detach().clone()
    made = Singular(linear, square)
    with made.live():
        assert torch.equal(linear.weight, before)
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    with made.live():
        live = linear.weight.detach().clone()
    assert torch.equal(linear.weight, before)
    made.fold()
    assert torch.equal(linear.weight, live) and not torch.equal(live, before)
    if not square:  # the singular values move, the vectors stay
        left, values, right = torch.linalg.svd(before, full_matrices=False)
        torch.testing.assert_close(
            left.T @ live @ right.T, (values + made.increment.detach()).diag(), atol=1e-4, rtol=1e-4
        )


def test_a_corner_without_increments_is_refused():
    with pytest.raises(UserError, match=r"^transform\.square=4: .*singular_rate=2e-4"):
        lsi(square=4)
