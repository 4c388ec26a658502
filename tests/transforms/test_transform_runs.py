"""Transforms in whole runs: they compose with solvers, and a run reloads to its number."""

import pytest
import torch
from helpers.models import tiny
from helpers.pipeline import PPL, SMALL, run

from qexp.models import state_diff
from qexp.packed import weights_file

pytestmark = pytest.mark.usefixtures("configured")


W4A4 = ("weight=channel_narrow", "weight.bits=4", "activation=int4_token")
W4A4KV4 = (*W4A4, "kv=quarot")
LEAVE_MAPS = ("transform=spinquant", "transform=flatquant", "transform=affinequant")
KEEP = "activation.grid.range.keep=1.0"
SENTENCES = [
    ("transform=smooth", "method=none"),
    ("transform=smooth", "method=gptq", "activation=int8_tensor"),
    ("transform=awq", "method=rtn", "transform.points=4"),
    ("transform=equalize", "method=spqr", "weight.group_size=32"),
    ("transform=os_plus", "method=gptq", "transform.points=3", "activation=int8_token"),
    ("transform=magr", "method=none", "transform.steps=20"),
    ("transform=magr", "method=gptq", "transform.steps=20", "weight/range=minmax_shrunk"),
    ("transform=rotate", "method=gptq", "activation=int8_token"),
    ("transform=quadapter", "method=gptq", "transform.steps=2", "activation=int8_tensor"),
    ("transform=omniquant", "method=rtn", "transform.epochs=1", "transform.sites=norms+value+up"),
    ("transform=spinquant", "method=gptq", "transform.trainer.steps=2", *W4A4KV4),
    ("transform=flatquant", "method=rtn", "transform.epochs=1", *W4A4KV4, KEEP),
    ("transform=affinequant", "method=rtn", "transform.epochs=1", "transform.online=true", *W4A4),
]


@pytest.mark.parametrize(
    ("family", "overrides"),
    [(("gpt2", "llama")[i % 2], words) for i, words in enumerate(SENTENCES)],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_transformed_run_reloads_to_the_same_number(tmp_path, family, overrides):
    first = run(tmp_path / "first", f"model=tiny_{family}", *overrides)
    again = run(tmp_path / "again", "model=from_run", f"run={tmp_path / 'first'}", small=[])
    assert again[PPL] == first[PPL]
    if any(word in LEAVE_MAPS for word in overrides):
        assert weights_file.maps(tmp_path / "first")


def test_every_solver_takes_a_transformed_model(tmp_path):
    for number, method in enumerate(
        (["method=billm", "weight=int"], ["method=quip", "weight.group_size=null"])
    ):
        metrics = run(tmp_path / str(number), "model=tiny_opt", "transform=smooth", *method)
        assert metrics["weight/count"] > 0


def test_what_a_rotation_adds_to_the_model_is_counted(tmp_path):
    plain, turned = (
        run(tmp_path / name, "model=tiny_gpt2", "method=rtn", f"transform={name}")
        for name in ("none", "rotate")
    )
    head = tiny("gpt2").model.lm_head.weight  # untied, and given the final norm's bias
    more = 16 * (head.numel() + len(head)) / plain["weight/count"]
    assert turned["weight/added_bits"] == pytest.approx(more) and more > 0
    assert turned["weight/bits"] == pytest.approx(plain["weight/bits"] + more)
    assert "weight/added_bits" not in plain


def test_encoders_reload_too(tmp_path):
    small = [*SMALL[:2], "eval=loss", "weight.group_size=32"]
    where = "transform.sites=norms+value+up"
    first = run(tmp_path / "first", "model=tiny_bert", "transform=smooth", where, small=small)
    again = run(tmp_path / "again", "model=from_run", f"run={tmp_path / 'first'}", small=[])
    key = next(name for name in first if name.endswith("/loss"))
    assert again[key] == first[key]


def test_edits_are_what_changed_and_nothing_else():
    model, fresh = tiny("gpt2").model, tiny("gpt2").model
    before = state_diff.checksums(model)
    assert state_diff.state_diff(model, before, ()) == {}
    head, block = model.lm_head, model.transformer.h[0]
    assert head.weight is model.transformer.wte.weight
    head.weight = torch.nn.Parameter(head.weight.detach() * 2)
    head.bias = torch.nn.Parameter(torch.ones(len(head.weight)))
    block.ln_1.bias.data += 1
    block.mlp.c_fc.weight.data *= 2  # coded, so stored elsewhere
    changed = state_diff.state_diff(model, before, ["transformer.h.0.mlp.c_fc"])
    assert set(changed) == {"lm_head.weight", "lm_head.bias", "transformer.h.0.ln_1.bias"}
    state_diff.apply_diff(fresh, changed)
    assert torch.equal(fresh.lm_head.weight, head.weight)
    assert torch.equal(fresh.transformer.wte.weight, model.transformer.wte.weight)
    assert torch.equal(fresh.lm_head(torch.eye(64)), head(torch.eye(64)))


def test_a_shared_tensor_that_changed_stays_shared():
    model, fresh = tiny("gpt2").model, tiny("gpt2").model
    before = state_diff.checksums(model)
    model.lm_head.weight.data *= 2
    changed = state_diff.state_diff(model, before, ())
    assert set(changed) == {"transformer.wte.weight"}
    state_diff.apply_diff(fresh, changed)
    assert fresh.lm_head.weight is fresh.transformer.wte.weight
    assert torch.equal(fresh.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize(
    "transform",
    [
        ("transform=quadapter", "transform.steps=3", "transform.init=smooth"),
        ("transform=omniquant", "transform.epochs=1", "transform.sites=norms+value+up"),
        ("transform=awq", "transform.points=3"),
        ("transform=rotate",),
    ],
    ids=lambda words: words[0],
)
def test_offloaded_blocks_are_transformed_alike(tmp_path, transform):
    words = ("model=tiny_llama", "method=rtn", "activation=int8_tensor", *transform)
    plain = run(tmp_path / "plain", *words)
    assert run(tmp_path / "offloaded", *words, "offload=true") == plain
