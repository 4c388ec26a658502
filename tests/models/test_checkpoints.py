"""Quantized checkpoints that model=local reads, and damaged ones that it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.exports import INPUTS, LLAMA, folders_of
from helpers.pipeline import run
from safetensors.torch import load_file, save_file

from qexp.common.errors import UserError
from qexp.models.export import export
from qexp.models.local import Local

pytestmark = pytest.mark.usefixtures("configured")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, configured: None):
    return folders_of(tmp_path_factory)


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
            Local(str(checkpoint)).loaded()


def test_a_truncated_checkpoint_is_named(checkpoint):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.path: .*model\.safetensors is truncated"):
        Local(str(checkpoint)).loaded()


def test_a_damaged_gguf_file_is_named(folders, tmp_path, own_cache):
    out = tmp_path / "a.gguf"
    export(folders(*LLAMA), out, "gguf")
    whole = out.read_bytes()
    for damaged in (whole[:-1000], whole[:4000], whole[:4] + b"\x63" + whole[5:]):
        out.write_bytes(damaged)
        with pytest.raises(UserError, match=r"model\.path: .*a\.gguf is a corrupt or truncated"):
            Local(str(out)).loaded()


def test_codes_out_of_range_and_unknown_versions(folders, tmp_path):
    made = {}
    for format, words in (("compressed_tensors", INPUTS["tensor"]), ("gptq", LLAMA)):
        export(folders(*words), tmp_path / format, format)
        made[format] = json.loads((tmp_path / format / "config.json").read_text())
    [group] = made["compressed_tensors"]["quantization_config"]["config_groups"].values()
    group["weights"]["num_bits"] = 4
    made["gptq"]["quantization_config"]["checkpoint_format"] = "gptq_v3"
    for format, said in (
        ("compressed_tensors", r"_proj has codes outside of 0 … 15, which 4 bits hold"),
        ("gptq", r"_proj has the checkpoint_format gptq_v3; gptq and gptq_v2 can be read"),
    ):
        (tmp_path / format / "config.json").write_text(json.dumps(made[format]))
        with pytest.raises(UserError, match=rf"model\.path: .*{said}"):
            Local(str(tmp_path / format)).loaded()


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
            Local(str(checkpoint)).loaded()


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
