"""AffineQuant: banded matrices change no logit, and without a band it is OmniQuant."""

from contextlib import ExitStack

import pytest
import torch
from helpers.channels import ALL, NORMS, TENSOR, VALUES, close, logits
from helpers.models import DECODERS, joined, task_of

from qexp.common.errors import UserError
from qexp.grid import IntGrid
from qexp.quantizers.scheme import FloatActivations
from qexp.transforms.learned_maps import Banded
from qexp.transforms.omniquant import OmniQuant
from qexp.walk import walk

GRID = IntGrid(4, symmetric=True)


def affine(**fields) -> OmniQuant:
    given = {"activation": TENSOR, "sites": VALUES, "epochs": 2, "heads": True, "online": True}
    return OmniQuant(GRID, **(given | fields))


@pytest.mark.parametrize("heads", [None, 3])
def test_entries_count_within_the_band(heads):
    made = Banded(8, heads, 0.1)
    made.inner.data.fill_(1.0)
    for band in (0, 2, 8):
        made.band = band
        matrix = made().detach()
        distance = (torch.arange(8)[:, None] - torch.arange(8)).abs()
        expected = torch.eye(8) + 0.1 * ((distance > 0) & (distance <= band))
        torch.testing.assert_close(matrix, expected.expand_as(matrix))
        assert float(torch.linalg.svdvals(matrix).min()) > 0
        product = matrix @ made.dual().detach().transpose(-1, -2)
        torch.testing.assert_close(product, torch.eye(8).expand_as(product), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", DECODERS)
def test_matrices_change_no_logit_live_or_folded(family):
    task, batch = task_of(family), joined(family)
    expected, learned = logits(task, batch), []
    with torch.no_grad():
        for block in walk(task, [batch]):
            learned = []
            made = affine(sites=ALL)._matrices(block, learned)
            for matrix in made:
                noise = torch.randn(matrix.inner.shape, generator=torch.Generator().manual_seed(0))
                matrix.inner.copy_(noise)
            with ExitStack() as stack:
                for piece in learned:
                    stack.enter_context(piece.live())
                close(logits(task, batch), expected, 1e-4)
            for piece in learned:
                piece.fold()
    close(logits(task, batch), expected, 1e-4)
    assert len(task.maps) == 2 * len(task.blocks)
    assert len(learned) == 2 + (family not in ("gpt2", "gpt_neox"))


def test_without_a_band_it_is_omniquant():
    batch, found = joined("llama"), []
    for fields in ({"heads": False, "online": False}, {"band": 0.0, "online": False}):
        task = task_of("llama")
        affine(**fields)(task, lambda: [batch])
        found.append(logits(task, batch))
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)


def test_matrices_learn_and_online_ones_are_counted():
    task, plain, batch = task_of("llama"), task_of("llama"), joined("llama")
    affine(clip_rate=0.0, scale_rate=5e-2, stability=1.0)(task, lambda: [batch])
    assert sum(made.bits() for made in task.maps.values()) == 3 * 2 * 16 * 64 * 64
    made = next(iter(task.maps.values())).factor_0
    assert float((made - torch.eye(64)).norm()) > 0.01
    affine(online=False, activation=FloatActivations())(plain, lambda: [batch])
    assert not plain.maps


def test_matrices_without_sites_are_refused():
    with pytest.raises(UserError, match="matrices follow channel scales"):
        affine(sites=None)
    assert affine(sites=NORMS).leaves_maps and not affine(online=False).leaves_maps
