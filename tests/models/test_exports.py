"""Runs that leave in a format of other software and come back by model=local."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from helpers.models import batches
from helpers.pipeline import PPL, SMALL, run
from safetensors.torch import load_file, save_file

from qexp.common.errors import UserError
from qexp.models import export as exports
from qexp.models.code_formats import FORMATS
from qexp.models.export import export, fits
from qexp.models.from_run import FromRun
from qexp.models.local import Local

pytestmark = pytest.mark.usefixtures("configured")

LLAMA = ("model=tiny_llama", "method=rtn")
MEASURED = (*LLAMA, "eval=held_out")
NO_EVAL = ["data=synthetic", "calibration.sequences=2", "calibration.length=32", "eval=none"]
W8 = ("weight=channel", "weight.bits=8", "weight.group_size=null")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, configured: None) -> Iterator:
    """`folders("model=…", …)`: the folder of a finished run, each made once."""
    made: dict[tuple[str, ...], Path] = {}

    def of(*overrides: str) -> Path:
        if overrides not in made:
            made[overrides] = tmp_path_factory.mktemp("run")
            measured = "eval=held_out" in overrides
            small = SMALL if measured else [*NO_EVAL, "weight.group_size=32"]
            run(made[overrides], *overrides, small=small)
            words = "".join(f"- {word}\n" for word in overrides)
            (made[overrides] / ".hydra" / "overrides.yaml").write_text(words)
        return made[overrides]

    return of


def ppl(folder: Path) -> float:
    return float(json.loads((folder / "metrics.json").read_text())[PPL])


@torch.no_grad()
def logits(source: Local | FromRun) -> torch.Tensor:
    return source.load().model(**batches("llama")[0]).logits


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


INPUTS = {
    "token": (*MEASURED, "activation=int8_token"),
    "tensor": (*MEASURED, *W8, "activation=int8_tensor"),
    "symmetric": (*MEASURED, *W8, "activation=int8_tensor", "activation.grid.symmetric=true"),
}


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
    export(folder, out, "compressed_tensors", lambda place: {"measured": {PPL: 12.5}})
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


@pytest.mark.parametrize("format", ["gptq", "gguf"])
def test_a_full_disk_leaves_nothing(folders, tmp_path, monkeypatch, format):
    monkeypatch.setattr(
        "qexp.common.files.os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full"))
    )
    with pytest.raises(UserError, match="cannot be written"):
        export(folders(*LLAMA), tmp_path / "a.gguf", format)
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


# checkpoints of others ---------------------------------------------------------------------------


@pytest.fixture
def checkpoint(folders, tmp_path) -> Path:
    export(folders(*LLAMA), tmp_path / "made", "compressed_tensors")
    return tmp_path / "made"


def damaged(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


UP = "model.layers.1.mlp.up_proj"


def test_a_damaged_checkpoint_says_which_linear(checkpoint):
    shutil.copytree(checkpoint, checkpoint.parent / "again")
    for change, said in (
        (lambda t: t.pop(f"{UP}.weight_scale"), "up_proj has no weight_scale"),
        (lambda t: t.pop(f"{UP}.weight_packed"), "up_proj has no weight_packed"),
        (lambda t: t.update({f"{UP}.weight_packed": torch.ones(3, 3).int()}), "has the shape"),
        (lambda t: t.update({f"{UP}.weight_scale": t[f"{UP}.weight_scale"] / 0}), "not finite"),
        (lambda t: t.pop("model.norm.weight"), r"no model\.norm\.weight"),
        (lambda t: [t.pop(n) for n in list(t) if "_proj." in n], "no linear has weight_packed"),
    ):
        shutil.rmtree(checkpoint)
        shutil.copytree(checkpoint.parent / "again", checkpoint)
        damaged(checkpoint, change)
        with pytest.raises(UserError, match=rf"model\.path: .*{said}"):
            Local(str(checkpoint)).load()


def test_a_truncated_checkpoint_is_named(checkpoint):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.path: .*model\.safetensors is truncated"):
        Local(str(checkpoint)).load()


def test_a_section_that_is_unknown_or_broken(checkpoint):
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    section = config["quantization_config"]
    for changed, said in (
        ({"quant_method": "aqlm"}, "already quantized by aqlm"),
        (section | {"config_groups": {}}, "target of none"),
        (section | {"config_groups": {"a": {"targets": ["Linear"], "format": "x"}}}, "format x"),
        (section | {"config_groups": [1]}, "is not as compressed-tensors has it"),
        ({"quant_method": "gptq", "bits": 4}, "no linear has qweight"),
    ):
        path.write_text(json.dumps(config | {"quantization_config": changed}))
        with pytest.raises(UserError, match=rf"model\.path: .*{said}"):
            Local(str(checkpoint)).load()


def test_inputs_of_one_tensor_need_one_scale(folders, tmp_path):
    out = tmp_path / "out"
    export(folders(*INPUTS["tensor"]), out, "compressed_tensors")
    key = "model.layers.1.self_attn.v_proj.input_scale"
    damaged(out, lambda tensors: tensors.update({key: tensors[key] * 2}))
    with pytest.raises(UserError, match=r"v_proj read one tensor and have different input_scale"):
        run(tmp_path / "a", "model=local", f"model.path={out}", "method=none")
    damaged(out, lambda tensors: tensors.pop(key))
    with pytest.raises(UserError, match=r"v_proj has no input_scale"):
        run(tmp_path / "b", "model=local", f"model.path={out}", "method=none")
