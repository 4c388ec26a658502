"""Whole runs on tiny models: every method, placement and family; saved, reloaded, refused."""

import json
from pathlib import Path

import pytest
import torch
from helpers.models import tiny
from helpers.pipeline import PPL, SMALL, run
from safetensors import safe_open

from qexp import pipeline
from qexp.common.errors import UserError
from qexp.models import device
from qexp.packed import weights_file
from qexp.runs import results
from qexp.solvers import factor

pytestmark = pytest.mark.usefixtures("configured")


@pytest.mark.parametrize(
    "overrides",
    [
        ("method=none",),
        ("method=rtn", "weight.bits=3"),
        ("method=rtn", "weight=nf4"),
        ("method=rtn", "weight=fp8_e4m3", "weight.group_size=null"),
        ("method=rtn", "weight=fp8_e5m2"),
        ("method=rtn", "weight=fp4_e2m1"),
        ("method=rtn", "weight.per_tensor=true", "weight.group_size=null", "weight.bits=8"),
        ("method=rtn", "weight/range=mse"),
        ("method=rtn", "weight/range=percentile", "weight.symmetric=true"),
        ("method=gptq", "weight/range=hqq", "weight.real_zero=true", "weight.include_zero=false"),
        ("method=gptq",),
        ("method=gptq", "method.solver.static_groups=false"),
        ("method=gptaq",),
        ("method=spqr", "method/target=asymmetric", "activation=int8_token"),
        ("method=gptq", "method.solver.act_order=false", "method.solver.static_groups=false"),
        ("method=gptq", "method.propagate=false", "method.chunk=2"),
        ("method=gptq", "method.hessian.sequential=false"),
        ("method=gptq", "weight=nf4", "method.solver.damp=0.1"),
        ("method=owq", "weight.bits=3"),
        ("method=sparsegpt", "method.solver.score=wanda"),
        ("method=slim_llm", "weight.bits=2", "weight/range=minmax"),
        ("method=adpq", "weight=channel", "weight.group_size=32", "activation=int8_outliers"),
        ("method=rtn", "activation=int8_tensor"),
        ("method=rtn", "activation=int8_tensor", "activation/grid/range=mse"),
        ("method=gptq", "activation=int8_token", "activation.grid.bits=6"),
        ("method=none", "activation=int8_tensor", "activation/placement=all_ops"),
        ("method=none", "activation=int8_token", "kv=int8_token"),
        ("method=none", "kv=int4_token"),
        ("model=tiny_gpt2", "method=gptq", "activation=int8_tensor"),
        ("method=gptq", "activation=int8_tensor", "kv=int8_token", "transform=smooth"),
        ("method=gptq", "activation=int8_tensor", "method.activations_first=false"),
    ],
    ids=" ".join,
)
def test_a_run_reloads_to_the_same_number(tmp_path, overrides):
    model = () if any(o.startswith("model=") for o in overrides) else ("model=tiny_llama",)
    first = run(tmp_path / "first", *model, *overrides)
    assert first[PPL] > 1 and first[f"{PPL}_stderr"] > 0
    again = run(tmp_path / "again", "model=from_run", f"run={tmp_path / 'first'}", small=[])
    assert again[PPL] == first[PPL]
    assert (tmp_path / "first" / "layers.csv").read_text().count("\n") == 1 + (
        0 if "method=none" in overrides else len(json_layout(tmp_path / "first"))
    )


def json_layout(folder: Path) -> dict:
    with safe_open(folder / weights_file.FILE, "pt") as file:
        return json.loads(file.metadata()["layout"])


@pytest.mark.parametrize("family", ["opt", "mistral", "qwen2", "qwen3", "gpt_neox", "gemma3"])
def test_families_run(tmp_path, family):
    float_ = run(tmp_path / "float", f"model=tiny_{family}", "method=none")
    fine = run(tmp_path / "fine", f"model=tiny_{family}", "method=gptq", "weight.bits=8")
    assert fine[PPL] == pytest.approx(float_[PPL], rel=0.02)
    assert "weight/bits" not in float_


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_encoders_run(tmp_path, family):
    small = ["data=synthetic", "eval=loss", "calibration.sequences=4", "weight.group_size=32"]
    metrics = run(tmp_path, f"model=tiny_{family}", "activation=int8_tensor", small=small)
    assert any(name.endswith("/loss") for name in metrics)


def test_quantizers_that_cannot_round_are_refused(tmp_path, monkeypatch):
    twice = ("activation=int8_token", "activation/placement=all_ops", "kv=int8_token")
    with pytest.raises(UserError, match=r"activation, kv: .* would carry two quantizers"):
        run(tmp_path, "model=tiny_llama", "method=none", *twice)
    monkeypatch.setattr("qexp.quantizers.operands.install", lambda *_: None)
    with pytest.raises(
        UserError, match=r"eval synthetic_raw_64x4 never called the quantizer of model"
    ):
        run(tmp_path, "model=tiny_llama", "method=none", "kv=int8_token")
    assert not (tmp_path / results.METRICS).exists()


def test_bits_are_those_of_the_file(tmp_path):
    metrics = run(tmp_path, "model=tiny_llama", "method=rtn", "weight.bits=3")
    with safe_open(tmp_path / weights_file.FILE, "pt") as file:
        size = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    measured = metrics["weight/bits"] * metrics["weight/count"] / 8
    assert metrics["weight/bits"] == 3 + (16 + 3) / 32
    assert measured <= size <= measured * 1.001


def test_more_bits_lose_less_and_gptq_less_than_rtn(tmp_path):
    errors = {
        (method, bits): run(
            tmp_path / f"{method}{bits}",
            "model=tiny_llama",
            f"method={method}",
            f"weight.bits={bits}",
        )["weight/error"]
        for method in ("rtn", "gptq")
        for bits in (2, 3, 4)
    }
    for method in ("rtn", "gptq"):
        assert errors[method, 2] > errors[method, 3] > errors[method, 4]


def test_a_finished_run_is_answered_until_something_changes(tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat, and the dog did not.\n" * 200)
    data = ["data=local", f"data.path={text}", "model=tiny_llama", "method=rtn", *SMALL[1:]]
    folder = tmp_path / "run"
    first = run(folder, small=data)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "load", lambda *_: pytest.fail("it ran again"))
        assert run(folder, small=data) == first
    text.write_text("All other words now stand here in some order that is new.\n" * 200)
    assert run(folder, small=data) != first
    monkeypatch.setattr("qexp.common.modules.Sources.digest", lambda *_: "other")
    monkeypatch.setattr(pipeline, "load", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(folder, small=data)


def test_the_same_run_twice_gives_the_same_number(tmp_path):
    one = run(tmp_path / "one", "model=tiny_llama", "method=gptq")
    two = run(tmp_path / "two", "model=tiny_llama", "method=gptq", "label=other")
    assert one == two


def test_a_full_disk_leaves_no_result(tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights_file, "save_file", full)
    with pytest.raises(UserError, match=r"weights\.safetensors"):
        run(tmp_path, "model=tiny_llama", "method=rtn")
    assert not (tmp_path / results.METRICS).exists()
    assert not (tmp_path / weights_file.FILE).exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["weight.bits=1"], "2 to 16"),
        (["weight.group_size=48"], r"q_proj.*group_size=48 does not divide"),
        (["model=local", "model.path=nowhere"], r"model\.path.*nowhere"),
        (["device=cuda:7"], "device=cuda:7"),
        (["model=tiny_gpt2", "eval.held_out.length=4096"], "length"),
        (["calibration.sequences=0"], r"calibration\.sequences"),
        (["calibration.length=100000"], r"calibration\.length: 100000 tokens, .* 2048 positions"),
        (["weight.symmetric=maybe"], r"^weight\.symmetric=maybe: give true or false\.$"),
        (["offload=maybe"], r"^offload=maybe: give true or false\.$"),
        (["threads=-2"], r"^threads=-2: give a whole number, 1 or more\.$"),
        (["device=meta"], "^device=meta cannot be used here"),
        (["eval.held_out=3"], r"^eval\.held_out=3: give a choice"),
        (["+eval.zeroshot_oac.limit=5"], r"eval\.zeroshot_oac .* ~eval\.zeroshot_oac"),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path, overrides, message):
    with pytest.raises(Exception, match=message) as error:
        run(tmp_path / "run", "model=tiny_llama", *overrides)
    assert isinstance(error.value, UserError) or "InterpolationResolutionError" in repr(error)
    assert not (tmp_path / "run" / results.METRICS).exists()


def test_a_run_that_is_not_there_is_named(tmp_path):
    with pytest.raises(Exception, match="run=nowhere"):
        run(tmp_path, "model=from_run", "run=nowhere", small=[])


def test_weights_that_are_not_finite_are_named(tmp_path, monkeypatch):
    original = device.place

    def damaged(task, *rest):
        task.blocks[1].mlp.up_proj.weight.data[3, 3] = torch.inf
        original(task, *rest)

    monkeypatch.setattr(device, "place", damaged)
    for method in ("rtn", "gptq"):
        with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj"):
            run(tmp_path / method, "model=tiny_llama", f"method={method}")
    with pytest.raises(UserError, match="synthetic_raw_64x4"):
        run(tmp_path / "none", "model=tiny_llama", "method=none")


@pytest.mark.parametrize("offload", [True, False])
def test_offloaded_blocks_give_the_same_number(tmp_path, offload):
    metrics = run(tmp_path, "model=tiny_llama", f"offload={offload}")
    assert metrics == run(tmp_path / "plain", "model=tiny_llama")


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=gptq"],
        ["method=spqr"],
        ["method=oac"],
        ["method=rtn", "transform=awq"],
        ["method=rtn", "activation=int8_tensor"],
    ],
    ids=" ".join,
)
def test_a_bfloat16_model_is_quantized_in_float32(tmp_path, monkeypatch, overrides):
    monkeypatch.setenv("QEXP_CACHE_DIR", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    loaded = tiny("llama", dtype="bfloat16")
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    seen = []
    factored = factor.inverse_factor

    def watched(hessian: torch.Tensor, *rest: object, **named: object) -> factor.Factor:
        seen.append(hessian.dtype)
        return factored(hessian, *rest, **named)

    monkeypatch.setattr(factor, "inverse_factor", watched)
    found = {}
    for name, least in (("large", 1), ("small", 10**9)):
        monkeypatch.setattr("qexp.models.pretrained.LARGE", least)
        made = tmp_path / name
        found[name] = run(made, "model=local", f"model.path={folder}", *overrides)[PPL]
        said = json.loads((made / "provenance.json").read_text())
        dtype = {"large": "bfloat16", "small": "float32"}[name]
        assert said["model"]["dtype"] == said["protocols"][PPL.split("/")[0]]["dtype"] == dtype
    assert found["large"] == pytest.approx(found["small"], rel=0.05)
    assert found["large"] != found["small"]
    assert set(seen) == ({torch.float32} if "rtn" not in overrides[0] else set())
