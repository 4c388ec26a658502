"""Exports read by the libraries that they are made for, and what those cannot read."""

import json
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers.exports import LLAMA, folders_of, logits
from helpers.models import data_dir
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qexp.commands.export import loaded
from qexp.common.errors import UserError
from qexp.models import target_library
from qexp.models.export import Options, export
from qexp.models.exported_run import ExportedRun
from qexp.models.from_run import FromRun
from qexp.models.gguf import GGUF
from qexp.models.llama2c import sentencepiece_tokenizer
from qexp.models.local import Local

pytestmark = pytest.mark.usefixtures("configured")
installed = pytest.mark.skipif(
    find_spec("compressed_tensors") is None, reason="compressed-tensors is not installed"
)
SYMMETRIC = (*LLAMA, "weight.symmetric=true")
MIXED = (
    *("model=tiny_llama", "method=allocated", "method/metric=relative", "method.budget=4.2"),
    "method.options=[3,4]",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, configured: None):
    return folders_of(tmp_path_factory)


def first(facts: dict) -> dict:
    return next(fact for fact in facts["verified"] if fact["level"] == 1)


EQUAL = {
    "compressed_tensors": LLAMA,
    "compressed_tensors symmetric": SYMMETRIC,
    "compressed_tensors 3 bits": (*SYMMETRIC, "weight.bits=3"),
    "compressed_tensors fp8": (*LLAMA, "weight=fp8_e4m3", "weight.group_size=null"),
    "compressed_tensors inputs": (*SYMMETRIC, "activation=int8_token"),
    "gguf": LLAMA,
    "float": LLAMA,
    "float gpt2": ("model=tiny_gpt2", "method=rtn"),
}


@installed
@pytest.mark.parametrize("case", EQUAL)
def test_the_library_computes_the_runs_logits(folders, tmp_path, case):
    format = case.split()[0]
    facts = export(folders(*EQUAL[case]), tmp_path / f"out.{format}", format)
    assert first(facts)["max_logit"] == 0.0
    assert first(facts)["library"].startswith("transformers 5.")


NEAR = {
    "gptq": LLAMA,
    "gptq symmetric": SYMMETRIC,
    "gptq 3 bits": (*SYMMETRIC, "weight.bits=3"),
    "awq": LLAMA,
    "nf4": (*LLAMA, "weight=nf4"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", NEAR)
def test_a_library_that_rounds_computes_logits_near_the_runs(folders, tmp_path, case):
    format = case.split()[0]
    for package in target_library.READERS[format].packages:
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    facts = export(folders(*NEAR[case]), tmp_path / "out", format)
    assert 0 <= first(facts)["kl"] < 1e-5 and 0 < first(facts)["max_logit"] < 0.1


@installed
@pytest.mark.parametrize("format", ["compressed_tensors", "gguf", "float"])
def test_a_bfloat16_run_is_compared_in_float32(folders, tmp_path, format):
    export(folders("model=tiny_llama", "method=none"), tmp_path / "float")
    path = (f"model.path={tmp_path / 'float'}", "model.dtype=bfloat16")
    folder = folders("model=local", *path, "method=rtn", "weight.symmetric=true")
    facts = export(folder, tmp_path / f"out.{format}", format)
    assert facts["dtype"] == "bfloat16" and first(facts)["max_logit"] == 0.0


@installed
def test_static_inputs_differ_at_ties_alone(folders, tmp_path, monkeypatch):
    w8 = ("weight=channel", "weight.bits=8", "weight.group_size=null", "activation=int8_tensor")
    facts = export(folders(*SYMMETRIC, *w8), tmp_path / "out", "compressed_tensors")
    assert first(facts)["kl"] < 1e-3 and "rounded by its formula" in loaded(first(facts))
    # with the reader's formula they are equal, so that a wrong range is found
    write = ExportedRun.with_codes

    def wrong(self, format, coded):
        state, section = write(self, format, coded)
        state["model.layers.0.mlp.up_proj.input_scale"] *= 1.001
        return state, section

    monkeypatch.setattr(ExportedRun, "with_codes", wrong)
    with pytest.raises(UserError, match=r"another model .*allowed: equal logits"):
        export(folders(*SYMMETRIC, *w8), tmp_path / "wrong", "compressed_tensors")


@installed
@pytest.mark.xfail(strict=True, reason="transformers 5.23 cannot load packed zero points")
def test_asymmetric_weights_are_loaded_as_they_are(folders, tmp_path):
    export(folders(*LLAMA), tmp_path / "out", "compressed_tensors")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


SKIPPED = {
    ("mlx", *LLAMA): "transformers does not read",
    ("gptq", *LLAMA): "gptqmodel is not installed",
    ("compressed_tensors", *LLAMA, "activation=int8_token"): "with neither quantized inputs",
    ("float", "model=tiny_vit", "method=rtn"): "reads images",
}


@pytest.mark.parametrize("case", SKIPPED, ids=" ".join)
def test_what_was_not_loaded_is_said_with_the_reason(folders, tmp_path, monkeypatch, case):
    version = target_library.version

    def without(name: str) -> str:
        if name == "gptqmodel":
            raise PackageNotFoundError(name)
        return "0" if name == "compressed-tensors" else version(name)

    monkeypatch.setattr(target_library, "version", without)
    facts = export(folders(*case[1:]), tmp_path / "out", case[0])
    assert SKIPPED[case] in first(facts)["skipped"]
    written = json.loads((tmp_path / "out" / "qexp.json").read_text())
    assert first(written) == first(facts)
    export(folders(*case[1:]), tmp_path / "file", case[0], Options(library=False))
    written = json.loads((tmp_path / "file" / "qexp.json").read_text())
    assert [fact["level"] for fact in written["verified"]] == [0]


def test_another_model_or_a_failure_leaves_nothing(folders, tmp_path, monkeypatch):
    def other(source, place, format, section):
        changed = FromRun(str(source.folder)).loaded().model
        changed.model.norm.weight.data[3] += 0.1
        return changed

    def fails(*_):
        raise KeyError("weight_scale")

    for change, said in ((other, "another model .*allowed: equal logits"), (fails, "cannot load")):
        monkeypatch.setattr(target_library, "_loaded", change)
        for place, format in (("a.gguf", "gguf"), ("a", "float")):
            with pytest.raises(UserError, match=rf"transformers 5.*{said}.*verify=file"):
                export(folders(*LLAMA), tmp_path / place, format)
    assert not list(tmp_path.iterdir())


# choices of the stored form ----------------------------------------------------------------------


@pytest.mark.parametrize("format", ["compressed_tensors", "mlx"])
def test_widened_codes_are_symmetric_with_one_bit_more(folders, tmp_path, format):
    options, out = Options(widen=True), tmp_path / "out"
    facts = export(folders(*LLAMA), out, format, options)
    name = "model.layers.1.mlp.up_proj"
    stored = load_file(out / "model.safetensors")
    assert f"{name}.weight_zero_point" not in stored
    assert torch.equal(logits(Local(str(out))), logits(FromRun(str(folders(*LLAMA)))))
    plain = export(folders(*LLAMA), tmp_path / "plain", format)
    assert facts["bits"] == pytest.approx(plain["bits"] + (1 if format == "mlx" else 1 - 4 / 32))
    with pytest.raises(UserError, match=r"weight\.bits=5: the format holds"):
        export(folders(*LLAMA), tmp_path / "gptq", "gptq", options)
    for other, said in (("gguf", "signed already"), ("float", "has no codes")):
        with pytest.raises(UserError, match=f"widen=true: .*{said}"):
            export(folders(*LLAMA), tmp_path / "a.gguf", other, options)


def test_a_wider_container_holds_the_same_codes(folders, tmp_path, own_cache):
    facts = export(folders(*LLAMA), tmp_path / "a.gguf", "gguf", Options(container="Q8_0"))
    assert facts["containers"] == ["Q8_0"] and facts["bits"] == 8.5
    found = logits(Local(str(tmp_path / "a.gguf")))
    assert torch.equal(found, logits(FromRun(str(folders(*LLAMA)))))
    for format, said in (("gguf", "the codes need Q5_0"), ("gptq", "format=gguf alone")):
        with pytest.raises(UserError, match=f"container=Q4_0: .*{said}"):
            export(folders(*LLAMA), tmp_path / "b.gguf", format, Options(container="Q4_0"))


# GGUF --------------------------------------------------------------------------------------------

ROPE = "{rope_type:llama3,rope_theta:10000.0,factor:8.0,low_freq_factor:1.0,high_freq_factor:4.0,\
original_max_position_embeddings:32}"


def test_llama3_frequencies_leave_and_come_back(folders, tmp_path, own_cache):
    scaled = (*LLAMA, f"+model.sizes.rope_parameters={ROPE}")
    out = tmp_path / "a.gguf"
    facts = export(folders(*scaled), out, "gguf")
    assert "rope_freqs" in first(facts)["skipped"]
    expected = logits(FromRun(str(folders(*scaled))))
    for source in (GGUF(str(out)), GGUF(str(out), keep=True), GGUF(str(out), keep=True)):
        torch.testing.assert_close(logits(source), expected, rtol=0, atol=1e-5)
    plain = logits(FromRun(str(folders(*LLAMA))))
    assert float((plain - expected).abs().max()) > 0.01
    # a model from such a file leaves with the same factors
    again = ("model=gguf", f"model.path={out}", "method=rtn")
    export(folders(*again), tmp_path / "b.gguf", "gguf")
    with pytest.raises(UserError, match="rope_type default and llama3, not yarn"):
        yarn = "{rope_type:yarn,rope_theta:10000.0,factor:8.0}"
        export(folders(*LLAMA, f"+model.sizes.rope_parameters={yarn}"), tmp_path / "c.gguf", "gguf")


def test_a_sentencepiece_vocabulary_cuts_texts_alike(folders, tmp_path, own_cache, stories, caplog):
    sentencepiece_tokenizer(stories).save_pretrained(tmp_path / "tokenizer")
    place = f"+model.tokenizer={tmp_path / 'tokenizer'}"
    folder = folders(*LLAMA, "model.sizes.vocab_size=512", place)
    export(folder, tmp_path / "a.gguf", "gguf")
    assert "llama.cpp keeps repeated spaces" in caplog.text
    tokenizer = GGUF(str(tmp_path / "a.gguf")).loaded().tokenizer
    expected = sentencepiece_tokenizer(stories)
    text = "Once upon a time, Lily héllo \U0001f600 wanted\n to go.\tHer mom said yes"
    for part in (text, text[:4], "a"):
        assert tokenizer(part)["input_ids"] == expected(part)["input_ids"]


@pytest.fixture
def stories() -> Path:
    path = (data_dir() or Path(".")) / "models" / "stories260K" / "tok512.model"
    if not path.is_file():
        pytest.skip("no trained checkpoint on this machine")
    return path


@installed
def test_two_widths_are_two_groups(folders, tmp_path):
    facts = export(folders(*MIXED, "weight.symmetric=true"), tmp_path / "out", "compressed_tensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert len(config["config_groups"]) == 2 and first(facts)["max_logit"] == 0.0
    facts = export(folders(*MIXED), tmp_path / "asymmetric", "compressed_tensors")
    assert "nor several config groups" in first(facts)["skipped"]
