"""Online maps: every family keeps its function; they come before watchers and quantizers."""

import copy

import pytest
import torch
from helpers.channels import close, logits
from helpers.models import FAMILIES, joined, task_of
from torch import nn

from qexp.common.errors import UserError
from qexp.grid import IntGrid
from qexp.quantizers import maps
from qexp.quantizers.hadamard import factors, hadamard, known
from qexp.quantizers.online import Factor, OnlineMap, hadamard_factors, orthogonal, restored
from qexp.quantizers.placement import KVCache, LinearInputs
from qexp.quantizers.scheme import QuantizedActivations, quantize_activations

# odd parts of the widths of ready models, and heads that have no Hadamard matrix
ORDERS = (12, 20, 28, 36, 44, 52, 60, 76, 100, 108, 140, 172)
WIDTHS = (576, 1536, 960, 2560, 768, 3072, 1600, 6400, 896, 4864, 11008, 13824, 14336, 8960, 6912)
TOKEN = QuantizedActivations(LinearInputs(), IntGrid(4, symmetric=True, narrow=True), dynamic=True)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some(kind: str, width: int) -> OnlineMap:
    matrix = torch.randn(4, 4, generator=seeded()) + 2 * torch.eye(4)
    rest = Factor("identity", width // 4)
    made = {
        "hadamard": hadamard_factors(width),
        "orthogonal": [Factor("matrix", width, orthogonal(width, seeded()))],
        "blocks": [rest, Factor("matrix", 4, matrix)],
        "across": [Factor("matrix", 4, matrix), rest],
        "kronecker": [Factor("matrix", 4, matrix), *hadamard_factors(width // 4)],
    }
    return OnlineMap(made[kind])


@pytest.mark.parametrize("order", [1, 2, 64, *ORDERS, 576])
def test_hadamard_matrices_are_orthogonal_and_of_ones(order):
    h = hadamard(order)
    assert set(h.flatten().tolist()) <= {1.0, -1.0}
    assert torch.equal(h @ h.T, order * torch.eye(order))


@pytest.mark.parametrize("width", WIDTHS)
def test_every_width_of_a_ready_model_has_a_fast_product(width):
    sides = factors(width)
    assert torch.tensor(sides).prod() == width and max(sides) <= 172
    assert known(width) in (1, *ORDERS)


def test_where_no_hadamard_matrix_is_known_a_random_factor_is_stored():
    assert factors(9) is None and factors(14) is None
    made = OnlineMap(hadamard_factors(14, seeded()))
    assert made.kinds == [("matrix", 7), ("hadamard", 2)] and made.bits() == 16 * 49
    with pytest.raises(UserError, match="no Hadamard matrix of 9"):
        hadamard_factors(9)


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal", "blocks", "across", "kronecker"])
def test_a_map_is_its_matrix_and_a_folded_weight_keeps_the_product(kind):
    made, width = some(kind, 48), 48
    x = torch.randn(3, 5, width, generator=seeded(1), dtype=torch.float64)
    weight = torch.randn(7, width, generator=seeded(2), dtype=torch.float64)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for (named, size), each in zip(made.kinds, made.factors(), strict=True):
        own = torch.eye(size) if each is None else each
        matrix = torch.kron(matrix, own.double() / (size**0.5 if named == "hadamard" else 1))
    close(made(x), x @ matrix.T, 1e-12)
    close(made(x) @ made.undo_rows(weight).T, x @ weight.T, 1e-12)
    close(made.undo_rows(weight) @ matrix, weight, 1e-12)
    q = torch.randn(3, 5, width, generator=seeded(3), dtype=torch.float64)
    close((made.dual()(q) * made(x)).sum(-1), (q * x).sum(-1), 1e-12)


@pytest.mark.parametrize("kind", ["hadamard", "kronecker"])
def test_a_map_is_restored_bit_for_bit(kind):
    made = some(kind, 48)
    again = restored(made.described(), made.stored())
    x = torch.randn(5, 48, generator=seeded())
    assert torch.equal(again(x), made(x)) and again.bits() == made.bits()
    assert made.bits() == (0 if kind == "hadamard" else 16 * 16)


def test_a_map_without_its_matrices_is_refused():
    with pytest.raises(UserError, match="lacks matrices"):
        restored(some("kronecker", 48).described(), {})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_a_map_on_every_site_leaves_the_logits_unchanged(family, dtype, share):
    task, batch = task_of(family).to(dtype), joined(family)
    expected = logits(task, batch)
    for block in range(len(task.blocks)):
        for group in task.arch.groups:
            width = task.blocks[block].get_submodule(group.linears[0]).in_features
            maps.map_inputs(task, block, group, some("kronecker", width))
        maps.map_keys(task, block, some("blocks", 16))
    close(logits(task, batch), expected, share)
    assert len(task.maps) == (len(task.arch.groups) + 1) * len(task.blocks)


def test_a_map_comes_before_watchers_and_these_before_the_quantizer():
    task, batch = task_of("llama"), joined("llama")
    group, module = task.arch.groups[0], task.blocks[0].self_attn.q_proj
    site = LinearInputs().sites(task)[0]
    seen: dict[str, torch.Tensor] = {}
    handle = site.watch(lambda x: seen.setdefault("watched", x))  # before map and quantizer exist
    quantize_activations(task, [TOKEN], lambda: pytest.fail("no data is asked for"))
    norm = task.blocks[0].input_layernorm
    norm.register_forward_hook(lambda _, __, y: seen.setdefault("made", y))
    module.register_forward_pre_hook(lambda _, args: seen.setdefault("read", args[0]))
    made = some("hadamard", 64)
    maps.map_inputs(task, 0, group, made)
    task.encode(batch)
    assert torch.equal(seen["watched"], made(seen["made"]))
    assert torch.equal(seen["read"], TOKEN.rounded(seen["watched"]))
    handle.remove()
    seen.clear()
    task.encode(batch)
    assert "watched" not in seen and "read" in seen


def test_linears_that_share_an_input_share_the_mapped_one():
    task, batch = task_of("llama"), joined("llama")
    calls: list[nn.Module] = []
    maps.map_inputs(task, 1, task.arch.groups[0], some("hadamard", 64))
    [made] = task.maps.values()
    made.register_forward_hook(lambda *_: calls.append(made))
    task.encode(batch)
    assert len(calls) == 1


def test_a_copy_of_the_model_has_maps_of_its_own():
    task, batch = task_of("llama"), joined("llama")
    maps.map_inputs(task, 0, task.arch.groups[-1], some("kronecker", 128))
    maps.map_keys(task, 0, some("blocks", 16))
    expected, twin = logits(task, batch), copy.deepcopy(task.model)
    for made in task.maps.values():
        made.factor_0 = None
        made.factor_1 = None
    with torch.no_grad():
        assert torch.equal(twin(**batch).logits, expected)


def test_keys_are_mapped_before_they_are_rounded():
    batch = joined("llama")
    cache = QuantizedActivations(KVCache(), IntGrid(4), dynamic=True)
    found = []
    for turned in (False, True):
        task = task_of("llama")
        if turned:
            for block in range(len(task.blocks)):
                maps.map_keys(task, block, some("hadamard", 16))
        quantize_activations(task, [cache], lambda: [])
        found.append(logits(task, batch))
    assert not torch.allclose(found[0], found[1], atol=1e-3)


def test_a_second_map_on_a_site_is_refused():
    task = task_of("llama")
    maps.map_inputs(task, 0, task.arch.groups[-1], some("hadamard", 128))
    with pytest.raises(UserError, match=r"an online map lies before mlp\.down_proj of block 0"):
        maps.map_inputs(task, 0, task.arch.groups[-1], some("hadamard", 128))
    maps.map_keys(task, 0, some("hadamard", 16))
    with pytest.raises(UserError, match="has an online map already"):
        maps.map_keys(task, 0, some("hadamard", 16))
