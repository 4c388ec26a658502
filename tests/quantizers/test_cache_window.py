"""Caches with a window: which tokens are rounded, and that decoding and single passes agree."""

from dataclasses import replace

import pytest
import torch
from helpers.models import DECODERS, joined, task_of
from helpers.protocols import CORPUS, protocol

from qexp.common.errors import FieldError, UserError
from qexp.eval.decoding import decoded
from qexp.grid import IntGrid
from qexp.grid.codebook import CodebookGrid
from qexp.grid.ranges import MinMax
from qexp.quantizers.cache_window import CacheWindow
from qexp.quantizers.placement import KVCache
from qexp.quantizers.scheme import QuantizedActivations, quantize_activations
from qexp.quantizers.window import Axis, Window

GRID = IntGrid(2, include_zero=False, real_zero=True, group_size=4, scale_dtype="float16")
KIVI = CacheWindow(GRID, window=8)
TOKENS = CacheWindow(IntGrid(2), keys="token")
STATIC = CacheWindow(replace(GRID, group_size=None), static_keys=True, sinks=1, per_head=False)
LEVELS = replace(STATIC, grid=CodebookGrid(2), before_rotary=True, outliers=0.05)
SCHEMES = {
    "kivi": KIVI,
    "groups": replace(KIVI, window=0),
    "tokens": replace(TOKENS, window=3, sinks=1),
    "both channels": replace(KIVI, values="channel"),
    "kvquant": replace(STATIC, before_rotary=True),
    "kvquant after": STATIC,
    "levels": LEVELS,
    "values of heads": replace(TOKENS, grid=CodebookGrid(2, group_size=8), outliers=0.2),
    "before rotary": replace(TOKENS, before_rotary=True, window=5, per_head=False),
}
# Every family with groups of tokens and with keys before the rotary embedding; the rest on one.
CASES = [(family, "kivi") for family in DECODERS]
CASES += [(family, "kvquant") for family in DECODERS if family != "gpt_neox"]
CASES += [("llama", name) for name in SCHEMES if name not in ("kivi", "kvquant")]


def quantized(family: str, *kinds):
    task = task_of(family)
    quantize_activations(task, kinds, lambda: [joined(family)])
    return task


def assert_close(one, two):
    """Sums of another order may move a value across a boundary between codes."""
    torch.testing.assert_close(one, two, atol=2e-3, rtol=1e-3)


@torch.no_grad()
def hidden(task, ids):
    return task.hidden(ids)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("kind", [KIVI, replace(TOKENS, window=8, sinks=2)], ids=str)
def test_a_window_as_long_as_the_text_is_the_float_cache(family, kind):
    ids = joined(family)["input_ids"]
    task = quantized(family, replace(kind, window=24))
    assert torch.equal(hidden(task, ids), hidden(task_of(family), ids))
    assert not torch.equal(hidden(quantized(family, kind), ids), hidden(task_of(family), ids))


@pytest.mark.parametrize("family", DECODERS)
def test_no_window_is_the_existing_cache(family):
    ids = joined(family)["input_ids"]
    existing = QuantizedActivations(KVCache(), IntGrid(2), dynamic=True)
    one, two = quantized(family, TOKENS), quantized(family, existing)
    assert torch.equal(hidden(one, ids), hidden(two, ids))


@pytest.mark.parametrize(("family", "name"), CASES)
@torch.no_grad()
def test_decoding_is_the_single_pass(family, name):
    kind, ids = SCHEMES[name], joined(family)["input_ids"][:2]
    task = quantized(family, kind)
    whole = hidden(task, ids)
    for prompt, chunk in ((5, 6), (18, 1)):
        assert_close(torch.cat(list(decoded(task, ids, prompt, chunk)), 1), whole)
    deployed = quantized(family, replace(kind, protocol="prefill"))
    plain = hidden(task_of(family), ids)
    assert torch.equal(hidden(deployed, ids), plain)
    one, some = (torch.cat(list(decoded(deployed, ids, 16, chunk)), 1) for chunk in (1, 5))
    assert_close(one, some)
    assert_close(one[:, :16], plain[:, :16])
    assert (one[:, 16:] - plain[:, 16:]).abs().mean() > 0.01


def test_fused_projections_have_no_keys_before_the_embedding():
    with pytest.raises(UserError, match=r"^kv\.before_rotary=true: .*give false"):
        quantized("gpt_neox", SCHEMES["kvquant"])


@pytest.mark.parametrize("name", SCHEMES)
def test_later_tokens_change_nothing_before_them(name):
    ids = joined("llama")["input_ids"]
    task = quantized("llama", SCHEMES[name])
    other = torch.cat([ids[:, :13], ids[:, 13:].flip(1)], 1)
    torch.testing.assert_close(hidden(task, other)[:, :13], hidden(task, ids)[:, :13])


def test_old_tokens_are_those_of_kivi():
    """Keys in blocks of R when R are complete, values one by one when R newer ones exist."""
    window = Window(Axis("channel", 2), Axis("token"), length=4, sinks=1)
    for i in range(11):
        keys, values = (window.is_old(name, 11, 11)[i].tolist() for name in ("key", "value"))
        assert keys == [1 <= j < 4 * (i // 4) for j in range(11)]
        assert values == [1 <= j < i - 4 for j in range(11)]
    assert torch.equal(window.is_old("key", 3, 11), window.is_old("key", 11, 11)[-3:])


def test_each_axis_by_hand():
    x = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0))
    channel = Axis("channel", 4).round(
        x, lambda rows: GRID(rows.reshape(-1, 8)).reshape(rows.shape)
    )
    for group in (slice(0, 4), slice(4, 8)):
        own = replace(GRID, group_size=None)(x[1, 2, group].T.contiguous()).T
        torch.testing.assert_close(channel[1, 2, group], own)
    assert torch.equal(channel[:, :, 8:], x[:, :, 8:])
    swapped = Axis("token").round(
        x[:, :, :8].transpose(2, 3), lambda t: GRID(t.reshape(-1, 8)).reshape(t.shape)
    )
    assert torch.equal(swapped.transpose(2, 3), channel[:, :, :8])
    seen = []
    Axis("token", per_head=False).round(x, lambda t: seen.append(t) or t)
    assert torch.equal(seen[0][1, 5], x[1, :, 5].flatten())
    constant = torch.arange(8.0).expand(1, 1, 4, 8)
    q = GRID(constant.transpose(2, 3).reshape(-1, 4))
    torch.testing.assert_close(q, constant.transpose(2, 3).reshape(-1, 4), rtol=1e-3, atol=0)


def test_keys_before_the_rotary_embedding_are_turned_after_rounding():
    task, seen = task_of("llama"), {}
    kind = replace(TOKENS, before_rotary=True, per_head=False)
    quantize_activations(task, [kind], list)
    ids = joined("llama")["input_ids"]
    attention = task.blocks[0].self_attn
    attention.k_proj.register_forward_hook(lambda _, __, y: seen.update(keys=y))
    one = hidden(task, ids)
    rounded, keys = seen["keys"].chunk(2, -1)
    assert all(len(token.unique()) <= 4 for token in rounded.flatten(0, 1))
    assert len(keys[0, 0].unique()) > 4
    other = task_of("llama")  # rounded keys from the projection itself, values as above
    quantize_activations(other, [replace(kind, before_rotary=False, keys="token")], list)
    for block in other.blocks:
        quantizer = other.quantizers[
            f"model/layers/{list(other.blocks).index(block)}/attention/key"
        ]
        grid = quantizer.grid
        quantizer.forward = lambda x: x
        block.self_attn.k_proj.register_forward_hook(
            lambda _, __, y, grid=grid: grid(y.flatten(0, 1)).reshape(y.shape)
        )
    torch.testing.assert_close(hidden(other, ids), one)


def test_bits_are_those_of_what_is_stored():
    """At n tokens: R float values and n mod R float keys."""
    task = quantized("llama", KIVI)
    window = task.blocks[0].self_attn._qexp_inside.window
    cost = 2 + 32 / 4
    for n in (3, 8, 23):
        floats = n % 8 + min(n, 8)
        expected = (cost * (2 * n - floats) + 16 * floats) / (2 * n)
        assert window.stored_bits(n) == pytest.approx(expected)
    published = Window(Axis("channel", 32), Axis("token"), 128, costs=(3.0, 3.0))
    assert published.stored_bits(1 << 20) == pytest.approx(3.0, abs=1e-2)


def test_the_protocol_that_decodes():
    fields = {"length": 32, "prompt": 8, "limit": 3}
    decoding = protocol("decoding", **fields)
    task = quantized("llama", KIVI)
    single = protocol("held_out", length=32, limit=3, context=8)
    one, whole = decoding(task), single(task)
    assert one["ppl"] == pytest.approx(whole["ppl"], rel=1e-5)
    assert (one["windows"], one["tokens"]) == (3.0, 3 * 24)
    assert 10 < one["cache_bits"] < 16
    assert decoding.name == f"{CORPUS.name}_decoding_32p8x3"
    slow = protocol("decoding", chunk=1, **fields)
    assert slow(task)["ppl"] == pytest.approx(one["ppl"], rel=1e-5)
    assert slow.definition() == decoding.definition()
    assert protocol("decoding", length=32, prompt=9).definition() != decoding.definition()
    plain = decoding(task_of("llama"))
    assert "cache_bits" not in plain and plain["ppl"] != one["ppl"]
    width = task.model.config.head_dim
    for dynamic, bits in ((True, 4 + (32 + 4) / width), (False, 4)):
        scheme = QuantizedActivations(KVCache(), IntGrid(4, per_tensor=not dynamic), dynamic)
        assert decoding(quantized("llama", scheme))["cache_bits"] == pytest.approx(bits)
    with pytest.raises(UserError, match="prompt 32 must be between 1 and length - 1"):
        protocol("decoding", length=32, prompt=32)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"window": 6}, "window=6: .*multiple of grid.group_size"),
        ({"grid": IntGrid(2)}, "grid.group_size=null: groups of a channel are tokens"),
        ({"before_rotary": True}, "before_rotary=true with keys=channel: .*static_keys=true"),
        ({"static_keys": True, "keys": "token"}, "static_keys=true with keys=token"),
        ({"static_keys": True}, "static_keys=true with grid.group_size=4"),
        ({"protocol": "both"}, "protocol=both is unknown"),
        ({"grid": IntGrid(2, per_tensor=True)}, "grid.per_tensor=true"),
        ({"outliers": 1}, "outliers=1: give a number from 0 to below 1"),
        ({"grid": replace(GRID, range=MinMax(0.9)), "outliers": 0.1}, "outliers=0.1: the range"),
    ],
)
def test_settings_that_cannot_work_are_refused(fields, said):
    with pytest.raises(FieldError, match=said):
        replace(KIVI, **fields)


def test_encoders_have_no_cache():
    with pytest.raises(UserError, match=r"^kv: .*give kv=none"):
        quantized("bert", KIVI)
