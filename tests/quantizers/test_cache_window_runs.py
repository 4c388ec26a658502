"""Runs with a windowed cache: saved ranges come back, training goes through it, both protocols."""

import json

import pytest
from helpers.pipeline import PPL, run

from qexp.common.errors import UserError
from qexp.runs import results

pytestmark = pytest.mark.usefixtures("configured", "own_cache")

DECODING = "synthetic_decoding_64p16x4"
SHORT = ("eval.decoding.length=64", "eval.decoding.prompt=16", "eval.decoding.limit=4")
BOTH = ("model=tiny_llama", "eval=[held_out,decoding]", *SHORT)
KIVI = ("kv=kivi", "kv.grid.group_size=8", "kv.window=16")


@pytest.mark.parametrize("kv", [KIVI, ("kv=kvquant", "kv.grid.bits=2")], ids=lambda kv: kv[0])
def test_a_run_is_measured_by_decoding_and_reloaded(tmp_path, kv):
    plain = run(tmp_path / "plain", "method=none", *BOTH)
    first = run(tmp_path / "first", "method=rtn", *BOTH, *kv)
    assert first[f"{DECODING}/ppl"] != plain[f"{DECODING}/ppl"]
    assert first[f"{DECODING}/cache_bits"] < 16
    again = run(tmp_path / "again", "model=from_run", f"run={tmp_path / 'first'}", small=[])
    for key in (PPL, f"{DECODING}/ppl", f"{DECODING}/cache_bits"):
        assert again[key] == first[key]


def test_a_prompt_of_a_deployed_cache_is_float(tmp_path, caplog):
    plain = run(tmp_path / "plain", "method=none", *BOTH, *KIVI[:1], "kv.grid.group_size=8")
    assert "kv.protocol" not in caplog.text
    plain = run(tmp_path / "float", "method=none", *BOTH)
    deployed = run(tmp_path / "deployed", "method=none", *BOTH, *KIVI, "kv.protocol=prefill")
    assert deployed[PPL] == plain[PPL]  # which a single pass does not see
    said = [r.getMessage() for r in caplog.records if "kv.protocol=prefill" in r.getMessage()]
    assert len(said) == 1 and said[0].startswith("eval synthetic_raw_64x4: ")
    assert deployed[f"{DECODING}/ppl"] != plain[f"{DECODING}/ppl"]
    protocols = json.loads((tmp_path / "deployed" / results.PROVENANCE).read_text())["protocols"]
    assert protocols[DECODING]["definition"]["prompt"] == 16


@pytest.mark.parametrize(
    "job",
    [
        ("method=lsq", "trainer=smoke", "kv=kvquant"),
        ("method=oac", "kv=kvquant"),
        ("method=lsq", "trainer=smoke", *KIVI),
    ],
    ids=lambda job: f"{job[0]} {job[-1]}",
)
def test_training_and_gradients_go_through_the_cache(tmp_path, job):
    made = run(tmp_path, "model=tiny_llama", "eval=held_out", *job, "weight.group_size=null")
    assert made[PPL] > 1


def test_a_text_shorter_than_a_group_is_refused(tmp_path):
    short = ("model=tiny_llama", "method=none", "kv=kivi", "eval.held_out.length=16")
    with pytest.raises(
        UserError, match=r"^kv\.grid\.group_size=32 does not divide the 16 channels"
    ):
        run(tmp_path, *short)
    with pytest.raises(UserError, match="never called the quantizer of"):
        run(tmp_path, *short, "kv.values=channel")
