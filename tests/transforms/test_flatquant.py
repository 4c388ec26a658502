"""FlatQuant: maps that are invertible by construction, change no logit, and lower the error."""

import math
from contextlib import ExitStack

import pytest
import torch
from helpers.channels import close, drift, logits, planted
from helpers.models import FAMILIES, joined, task_of

from qexp.common.errors import UserError
from qexp.grid import IntGrid
from qexp.grid.ranges import MSE
from qexp.methods.blockwise import Direct
from qexp.quantizers.activation import FakeQuant
from qexp.quantizers.placement import KVCache, LinearInputs
from qexp.quantizers.scheme import FloatActivations, QuantizedActivations, quantize_activations
from qexp.solvers.rtn import RTN
from qexp.transforms.activation_clip import ActivationClip, is_learnable
from qexp.transforms.flatquant import FlatQuant
from qexp.transforms.learned_maps import Invertible
from qexp.transforms.site_collection import collect_statistics
from qexp.walk import walk

NARROW = IntGrid(4, symmetric=True, narrow=True)
TOKEN = QuantizedActivations(LinearInputs(), NARROW, dynamic=True)
CACHE = QuantizedActivations(KVCache(), IntGrid(4), dynamic=True)


def flat(**fields) -> FlatQuant:
    return FlatQuant(NARROW, **({"activation": TOKEN, "kv": CACHE, "epochs": 1} | fields))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_matrix_and_its_dual_are_inverses():
    made = Invertible(12, seeded())
    orthogonal = made().detach()
    torch.testing.assert_close(orthogonal @ orthogonal.T, torch.eye(12), atol=1e-5, rtol=0)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=seeded(1)) / 3
    product = (made() @ made.dual().T).detach()
    torch.testing.assert_close(product, torch.eye(12), atol=1e-5, rtol=0)
    assert not torch.allclose(made().detach(), made.dual().detach(), atol=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_change_no_logit_live_or_folded(family):
    task, batch = task_of(family), joined(family)
    expected, step = logits(task, batch), flat()
    with torch.no_grad():
        for block in walk(task, [batch]):
            found = collect_statistics(block, step._scaled(block), replay=False)
            pieces = step.pieces(block, found, seeded(block.index))
            for piece in pieces:
                for parameter in piece.parameters():
                    parameter += 0.1 * torch.randn(parameter.shape, generator=seeded())
            with ExitStack() as stack:
                for piece in pieces:
                    stack.enter_context(piece.live())
                close(logits(task, batch), expected, 1e-4)
            for piece in pieces:
                piece.fold()
            close(logits(task, batch), expected, 1e-4)
    each = {"norms": 2, "heads": 1, "down": 1, "keys": 1}
    assert len(task.maps) == sum(each.values()) * len(task.blocks)


def test_the_error_of_the_quantized_model_falls():
    batch = joined("llama")
    expected, errors = logits(planted("llama"), batch), []
    for steps in ([], [flat(epochs=8, kv=FloatActivations(), batch=1)]):
        task = planted("llama")
        for step in [*steps, Direct(RTN(NARROW), [TOKEN])]:
            step(task, lambda: [batch])
        errors.append(drift(task, batch, expected))
    assert errors[1] < 0.3 * errors[0]


def test_keys_are_learned_only_where_a_cache_is_rounded():
    task = task_of("llama")
    flat(kv=FloatActivations(), maps=["keys", "values"], clip=False)(
        task, lambda: [joined("llama")]
    )
    assert not task.maps
    flat(maps=["keys"], clip=False)(task, lambda: [joined("llama")])
    assert [name.rpartition("/")[2] for name in task.maps] == ["key"] * 3


def test_stored_bits_are_those_of_the_factors():
    task = task_of("llama")
    flat(kv=FloatActivations())(task, lambda: [joined("llama")])
    each = [8 * 8 + 8 * 8, 4 * 4, 8 * 8 + 8 * 8, 8 * 8 + 16 * 16]
    assert sum(made.bits() for made in task.maps.values()) == 3 * 16 * sum(each)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"maps": ["up"]}, "up is unknown; give a list of norms, heads, down, keys, values"),
        ({"grid": IntGrid(4, range=MSE())}, "only min-max reproduces"),
        ({"epochs": 0}, "epochs"),
    ],
)
def test_settings_that_cannot_work_are_refused(fields, said):
    with pytest.raises(UserError, match=said):
        FlatQuant(**({"grid": NARROW, "activation": TOKEN, "kv": CACHE} | fields))


def test_ends_of_activation_ranges_are_learned_and_kept_by_the_quantizers():
    task, batch = task_of("llama"), joined("llama")
    flat(maps=[], diagonals=False, clip=False, epochs=4, batch=1)(task, lambda: [batch])
    found = quantized_sites(task, batch)
    assert found.keys() == task.shares.keys() and len(found) == 4 * 3
    for name, quantizer in found.items():
        low, high = task.shares[name]
        assert 0.3 < low < 1 and 0.3 < high < 1
        assert (low, high) != pytest.approx([1 / (1 + math.exp(-4))] * 2, abs=1e-6)
        rows = torch.randn(3, 64, generator=seeded())
        reach = torch.maximum(-low * rows.amin(1), high * rows.amax(1))
        torch.testing.assert_close(quantizer(rows).abs().amax(1), reach, rtol=0.15, atol=0)
        own = FakeQuant(NARROW, dynamic=True)
        own.load_state_dict(quantizer.state_dict())
        assert torch.equal(own(rows), quantizer(rows))
        assert not torch.equal(own(rows), NARROW(rows))


def test_a_scheme_with_learned_ends_of_1_is_the_scheme():
    x = torch.randn(5, 16, generator=seeded())
    clip = ActivationClip(TOKEN)
    for parameter in clip.parameters():
        parameter.data.fill_(100.0)
    assert torch.equal(clip(x), TOKEN.rounded(x))
    clip(x).square().sum().backward()
    assert not is_learnable(FloatActivations())
    task = task_of("llama")
    flat(maps=[], activation_clip=False)(task, lambda: [joined("llama")])
    assert not task.shares


def quantized_sites(task, batch):
    quantize_activations(task, [TOKEN], lambda: [batch])
    return {name.replace("/", "."): q for name, q in task.quantizers.items()}
