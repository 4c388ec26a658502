"""Runs that leave in a format of other software and come back by model=local."""

import json
import os
import resource
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, quants
from helpers.exports import INPUTS, LLAMA, NO_EVAL, folders_of, logits
from helpers.models import batches
from helpers.pipeline import PPL, run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qexp.common.errors import UserError
from qexp.models import export as exports
from qexp.models.code_formats import FORMATS
from qexp.models.export import Options, export, fits
from qexp.models.from_run import FromRun
from qexp.models.local import Local

pytestmark = pytest.mark.usefixtures("configured")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, configured: None):
    return folders_of(tmp_path_factory)


def ppl(folder: Path) -> float:
    return float(json.loads((folder / "metrics.json").read_text())[PPL])


CASES = {  # format and what makes a run that fits it
    "compressed_tensors": LLAMA,
    "compressed_tensors_fp8": (*LLAMA, "weight=fp8_e4m3", "weight.group_size=null"),
    "compressed_tensors_qwen2": ("model=tiny_qwen2", *LLAMA[1:]),
    "gptq_v2": LLAMA,
    "gptq_order": ("model=tiny_llama", "method.solver.static_groups=false"),
    "awq": LLAMA,
    "mlx": LLAMA,
    "nf4": (*LLAMA, "weight=nf4"),
    "gguf": LLAMA,
    "gguf_qwen2": ("model=tiny_qwen2", *LLAMA[1:]),
    # transformers reads no head_dim from a qwen3 file: it is 128, as in all published models
    "gguf_qwen3": ("model=tiny_qwen3", "model.sizes.head_dim=128", *LLAMA[1:], "weight.bits=3"),
    "float": LLAMA,
}


@pytest.mark.parametrize("case", CASES)
def test_an_export_comes_back_as_the_same_model(folders, tmp_path, own_cache, case):
    folder = folders(*CASES[case])
    format = next(name for name in (*FORMATS, "gguf", "float") if case.startswith(name))
    out = tmp_path / ("out.gguf" if format == "gguf" else "out")
    facts = export(folder, out, format)
    assert facts["verified"][0]["matrices"] == (0 if format == "float" else 21)
    assert torch.equal(logits(Local(str(out))), logits(FromRun(str(folder))))


@pytest.mark.parametrize("change", ["transform=awq", "transform=smooth", "transform=rotate"])
def test_what_a_transform_folded_leaves_with_the_weights(folders, tmp_path, change):
    tied = ("model=tiny_llama", "+model.sizes.tie_word_embeddings=true", "method=rtn", change)
    folder, out = folders(*tied), tmp_path / "out"
    export(folder, out, "compressed_tensors")
    assert torch.equal(logits(Local(str(out))), logits(FromRun(str(folder))))
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    assert config["tie_word_embeddings"] == (change != "transform=rotate")
    names = load_file(out / "model.safetensors")
    assert ("lm_head.weight" in names) != config["tie_word_embeddings"]


@pytest.mark.parametrize("untied", [True, False])
def test_a_reloaded_run_says_whether_its_head_is_tied(folders, tmp_path, untied):
    tied = ("model=tiny_llama", "+model.sizes.tie_word_embeddings=true", "method=rtn")
    folder = folders(*tied, *(["transform=rotate"] if untied else []))
    model = FromRun(str(folder)).loaded().model
    assert model.config.tie_word_embeddings == (not untied)
    model.save_pretrained(tmp_path / "copy")
    copy = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    with torch.no_grad():
        found, expected = (each(**batches("llama")[0]).logits for each in (copy, model))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("case", INPUTS)
def test_quantized_inputs_leave_and_come_back(folders, tmp_path, case):
    folder, out = folders(*INPUTS[case]), tmp_path / "out"
    export(folder, out, "compressed_tensors")
    again = run(tmp_path / "again", "model=local", f"model.path={out}", "method=none")
    assert again[PPL] == ppl(folder)
    stored = load_file(out / "model.safetensors")
    scale = stored.get("model.layers.0.self_attn.k_proj.input_scale")
    assert (scale is not None) == ("int8_tensor" in " ".join(INPUTS[case]))
    zero = stored.get("model.layers.0.self_attn.k_proj.input_zero_point")
    assert (zero is not None) == (case == "tensor")


def test_a_folder_says_what_it_is(folders, tmp_path):
    folder, out = folders(*INPUTS["token"]), tmp_path / "out"
    measured = Options(measure=lambda place: {"measured": {PPL: 12.5}})
    export(folder, out, "compressed_tensors", measured)
    names = {path.name for path in out.iterdir()}
    assert names >= {"config.json", "tokenizer.json", "README.md", "qexp.json"}
    assert names >= {"generation_config.json", "model.safetensors"}
    modes = {path.stat().st_mode & 0o777 for path in out.iterdir()}
    assert modes == {0o666 & ~_umask()}
    facts = json.loads((out / "qexp.json").read_text())
    assert facts["format"] == "compressed_tensors" and facts["measured"] == {PPL: 12.5}
    card = (out / "README.md").read_text()
    assert "- compressed-tensors" in card and "| 12.5 |" in card
    assert f"qexp {' '.join(INPUTS['token'])}" in card
    assert "4 bits, groups of 32, asymmetric" in card
    stored = load_file(out / "model.safetensors")
    size = sum(8 * t.numel() * t.element_size() for n, t in stored.items() if "_proj." in n)
    assert facts["bits"] == pytest.approx(size / (3 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_gguf_file_holds_the_facts_and_the_tokenizer(folders, tmp_path, own_cache):
    out = tmp_path / "a.gguf"
    facts = export(folders(*LLAMA), out, "gguf")
    reader = GGUFReader(out)
    assert facts["containers"] == ["Q5_0"] and facts["bits"] == 5.5
    assert json.loads(reader.get_field("qexp.facts").contents())["run"] == facts["run"]
    words = reader.get_field("tokenizer.ggml.tokens").contents()
    assert len(words) == 264 and words[256] == "<s>" and words[263] == "[PAD263]"
    # a model from a GGUF file keeps its tokenizer, key by key
    again = ("model=gguf", f"model.path={out}", *LLAMA[1:], "weight.group_size=32")
    run(tmp_path / "run", *again, small=NO_EVAL)
    export(tmp_path / "run", tmp_path / "b.gguf", "gguf")
    other = GGUFReader(tmp_path / "b.gguf")
    keys = [key for key in reader.fields if key.startswith("tokenizer.")]
    assert keys == [key for key in other.fields if key.startswith("tokenizer.")]
    assert all(reader.fields[k].contents() == other.fields[k].contents() for k in keys)


@pytest.mark.parametrize(("bits", "type_"), [(4, "Q4_0"), (5, "Q5_0"), (8, "Q8_0")])
def test_a_run_on_llama_cpps_grid_leaves_as_its_own_bytes(folders, tmp_path, bits, type_):
    """Round-to-nearest is what llama.cpp quantizes the float model to; GPTQ has equal bytes."""
    grid = ("model=tiny_llama", "weight=gguf", f"weight.bits={bits}")
    plain = FromRun(str(folders("model=tiny_llama", "method=none"))).loaded().model.state_dict()
    sizes = {}
    for method in ("rtn", "gptq"):
        out = tmp_path / f"{method}.gguf"
        facts = export(folders(*grid, f"method={method}"), out, "gguf")
        assert facts["containers"] == [type_] and facts["bits"] == facts["run_bits"] == bits + 0.5
        stored = {tensor.name: tensor.data for tensor in GGUFReader(out).tensors}
        sizes[method] = sum(data.nbytes for data in stored.values())
        weight = plain["model.layers.1.mlp.up_proj.weight"].numpy()
        equal = stored["blk.1.ffn_up.weight"] == quants.quantize(
            weight, GGMLQuantizationType[type_]
        )
        assert equal.all() == (method == "rtn")
    assert sizes["rtn"] == sizes["gptq"]


# refusals ----------------------------------------------------------------------------------------


def test_what_fits_a_run_is_printed_with_the_reasons(folders):
    said = fits(folders(*LLAMA))
    assert said.keys() == {*FORMATS, "gguf", "float"}
    assert (
        said["compressed_tensors"].startswith("exact, ")
        and "dequantize=True" in (said["compressed_tensors"])
    )
    assert said["gguf"] == "exact in Q5_0, 5.50 bits a weight"
    assert "weight=nf4" in said["nf4"] and said["nf4"].startswith("no: ")


REFUSED = {
    ("gptq", "method=none"): "method: the run quantized no weights",
    ("compressed_tensors", "method=rtn", "activation=int8_tensor"): "activation=int8_tensor",
    ("gguf", "method=rtn", "activation=int8_tensor"): "activation",
    ("float", "method=rtn", "activation=int8_tensor"): "activations are quantized",
    ("compressed_tensors", "method=rtn", "kv=int8_token"): "kv",
    ("float", "method=none", "transform=quarot"): "online maps",
    ("gptq", "transform=quarot"): "online maps",
    ("compressed_tensors", "method.solver.static_groups=false"): "static_groups=false",
    ("gguf", "method=rtn", "model=tiny_gpt2"): "Conv1D",
    ("gguf", "method=rtn", "model=tiny_opt"): "families llama",
}


@pytest.mark.parametrize("case", REFUSED, ids=" ".join)
def test_a_refusal_names_the_key_and_leaves_nothing(folders, tmp_path, case):
    format, *overrides = case
    model = [] if any(word.startswith("model=") for word in overrides) else ["model=tiny_llama"]
    folder = folders(*model, *overrides)
    with pytest.raises(UserError, match=REFUSED[case]):
        export(folder, tmp_path / ("a.gguf" if format == "gguf" else "a"), format)
    assert not list(tmp_path.iterdir())


def test_an_existing_place_is_kept(folders, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    for place in (tmp_path / "out", tmp_path / "out" / "mine"):
        with pytest.raises(UserError, match="already exists"):
            export(folders(*LLAMA), place, "gptq")
    with pytest.raises(UserError, match=r"ends with \.gguf"):
        export(folders(*LLAMA), tmp_path / "other", "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("format", ["gptq", "gguf", "float"])
def test_a_full_disk_leaves_nothing(folders, tmp_path, format):
    folder = folders(*LLAMA)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # no file may be larger
    try:
        with pytest.raises(UserError, match=r"a\.gguf: cannot be written"):
            export(folder, tmp_path / "a.gguf", format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_an_export_that_differs_from_the_run_never_appears(folders, tmp_path, monkeypatch):
    read = FORMATS["gptq"].read

    def wrong(tensors, config, name):
        coded = read(tensors, config, name)
        coded.codes[3, 5] ^= 1
        return coded

    monkeypatch.setattr(FORMATS["gptq"], "read", wrong)
    with pytest.raises(RuntimeError, match="is not that of the run"):
        export(folders(*LLAMA), tmp_path / "a", "gptq")
    monkeypatch.setattr(exports, "equal", lambda *_: False)
    with pytest.raises(RuntimeError, match="does not hold the tensor"):
        export(folders(*LLAMA), tmp_path / "a.gguf", "gguf")
    assert not list(tmp_path.iterdir())
