"""Random channel scales: the same function, and weights on no common grid."""

import hashlib

import pytest
import torch
from helpers.channels import ALL, NORMS, close, logits
from helpers.models import FAMILIES, joined, task_of

from qexp.common.errors import FieldError, UserError
from qexp.grid import IntGrid
from qexp.transforms.dither import Dither
from qexp.transforms.rescale import Rescale

FILE = IntGrid(4, group_size=32, real_zero=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_logit_changes_and_every_scaled_linear_does(family):
    task, batch = task_of(family), joined(family)
    expected = logits(task, batch)
    before = {name: linear.weight.clone() for name, linear in task.linears().items()}
    assert Rescale(0.5)(task, list) == []
    close(logits(task, batch), expected, 1e-4)
    moved = [n for n, linear in task.linears().items() if not torch.equal(linear.weight, before[n])]
    assert moved
    if family == "llama":
        assert len(moved) == len(before)


def test_a_spread_of_zero_changes_nothing_and_the_seed_decides():
    def weights(spread: float, seed: int) -> torch.Tensor:
        task = task_of()
        Rescale(spread, seed=seed)(task, list)
        return torch.cat([linear.weight.detach().flatten() for linear in task.linears().values()])

    assert torch.equal(weights(0, 0), weights(0, 1))
    assert torch.equal(weights(0.2, 0), weights(0.2, 0))
    assert not torch.equal(weights(0.2, 0), weights(0.2, 1))


def test_a_grid_that_was_lossless_is_not_afterwards():
    task = task_of()
    for linear in task.linears().values():
        linear.weight.data = FILE(linear.weight.detach())
    plain = torch.randn(256, 96, generator=torch.Generator().manual_seed(0))
    error = float((FILE(plain) - plain).square().sum() / plain.square().sum())
    Rescale(0.1)(task, list)
    for linear in task.linears().values():
        weight = linear.weight.detach()
        lost = float((FILE(weight) - weight).square().sum() / weight.square().sum())
        assert 0.5 * error < lost < 2 * error


def test_the_stand_ins_weights_are_the_same_bits_on_every_machine():
    """From given weights: products of float32 and uniform numbers of a seeded generator."""
    task = task_of()
    for number, parameter in enumerate(task.parameters()):
        codes = (torch.arange(parameter.numel()) * (2 * number + 7)) % 16 - 8
        parameter.data = (codes * 0.125).reshape(parameter.shape) + (parameter.ndim == 1) * 2
    Dither(0.1)(task, list)
    Rescale(0.1)(task, list)
    content = b"".join(p.detach().numpy().tobytes() for p in task.parameters())
    assert hashlib.sha256(content).hexdigest()[:16] == "29e47195d4dd9ece"


def test_wrong_fields_are_refused():
    with pytest.raises(FieldError, match="spread=-1"):
        Rescale(-1)
    with pytest.raises(FieldError, match="sites=all"):
        Rescale(sites="all")
    with pytest.raises(UserError, match="is post-norm"):
        Rescale(sites=NORMS)(task_of("bert"), list)
    assert Rescale().sites == ALL
