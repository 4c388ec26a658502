"""The Python interface, on a tiny model, and on a pipeline without a model."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import stub

import qexp
from qexp import api, pipeline
from qexp.common.errors import UserError

TINY = (
    *("model=tiny_llama", "data=synthetic", "calibration=synthetic", "weight.group_size=32"),
    *("eval.held_out.length=64", "eval.held_out.limit=4", "progress=false", "threads=1"),
)
PPL = "synthetic_raw_64x4/ppl"
NAMES = ("Run", "UserError", "load", "run", "runs", "sweep")


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder and an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QEXP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("QEXP_SWEEP", "")
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model: weight.bits of 11, 12 and 13 fail in three ways."""
    monkeypatch.setattr(pipeline, "answer", stub.answer)
    monkeypatch.setattr(pipeline, "run", stub.run)


def test_a_run_is_that_of_the_command_and_its_model_computes_what_was_measured() -> None:
    run = qexp.run(*TINY, "method=gptq", "weight.bits=3", "activation=int8_token")
    assert run.folder.parent == Path.cwd() / "outputs"
    assert run.choices["method"] == "gptq" and run.config["weight"]["bits"] == 3
    assert run.metrics[PPL] > 1 and len(run.layers) == 21
    written = (run.folder / "metrics.json").stat().st_mtime_ns
    assert qexp.run(*TINY, "weight.bits=3", "method=gptq", "activation=int8_token") == run
    assert (run.folder / "metrics.json").stat().st_mtime_ns == written

    model, tokenizer = qexp.load(run.folder)
    weight = model.get_submodule("model.layers.0.mlp.up_proj").weight
    assert all(len(group.unique()) <= 8 for group in weight.view(-1, 32))
    ids = tokenizer("one two three", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3
    again = qexp.run("model=from_run", f"run={run.folder}", "progress=false")
    assert again.metrics[PPL] == run.metrics[PPL]
    inputs = torch.randint(0, 250, (1, 8))
    with torch.no_grad():
        quantized = model(inputs).logits
        for module in model.modules():
            module._forward_pre_hooks.clear()
        assert not torch.equal(model(inputs).logits, quantized), "its activations are quantized"


def test_a_sweep_gives_its_runs_in_order_and_a_table(stubbed) -> None:
    made = qexp.sweep(*TINY, "method=rtn,gptq", "weight.bits=3,4")
    assert [(run.choices["method"], run.config["weight"]["bits"]) for run in made] == [
        *(("rtn", 3), ("rtn", 4), ("gptq", 3), ("gptq", 4))
    ]
    assert [run.folder for run in qexp.sweep(*TINY, "weight.bits=3,4", "method=rtn,gptq")] == [
        run.folder for run in made
    ]
    qexp.run(*TINY, "method=none")
    table = qexp.runs("outputs")
    assert list(table.columns[:4]) == ["folder", "model", "method", "weight.bits"]
    assert table["method"].tolist() == ["none", "gptq", "gptq", "rtn", "rtn"]
    assert table["weight.bits"].isna().tolist() == [True] + [False] * 4
    assert table.pivot(index="method", columns="weight.bits", values="held_out/ppl").loc["rtn", 3]
    assert list(qexp.runs("outputs", keys=["seed"]).columns[:3]) == ["folder", "seed", "seconds"]


def test_numbers_of_two_definitions_have_two_columns(stubbed, monkeypatch) -> None:
    qexp.run(*TINY, "method=rtn")
    run = qexp.run(*TINY, "method=gptq")
    path = run.folder / "provenance.json"
    path.write_text(path.read_text().replace("12345678", "87654321"))
    table = api.runs("outputs")
    assert {"held_out/ppl [12345678]", "held_out/ppl [87654321]"} <= set(table.columns)
    assert table["held_out/ppl [12345678]"].count() == 1


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["weight.bitz=3"], r"^weight\.bitz: there is no such key; did you mean weight\.bits\?$"),
        (["method=gtpq"], "^method=gtpq: there is no such choice; did you mean gptq"),
        (["weight.bits=11"], "^weight.bits=11: is not wanted; ask for another$"),
        (["threads=-2"], "^threads=-2: give a whole number"),
        (["seed=maybe"], "^seed=maybe: give"),
        (["dry_run=true"], "nothing ran"),
        (["hydra.mode=MULTIRUN"], "call qexp.sweep"),
        (["--cfg"], "^--cfg: is no override"),
        (["gptq"], "^gptq: is no override"),
        (["hydra.run.dir=/proc/x"], "no files can be written there"),
    ],
    ids=str,
)
def test_a_mistake_is_a_user_error(overrides, said, stubbed) -> None:
    before = logging.getLogger().handlers[:], list(sys.argv)
    with pytest.raises(UserError, match=said):
        qexp.run(*TINY, *overrides)
    assert (logging.getLogger().handlers[:], sys.argv) == before
    assert qexp.UserError is UserError


def test_options_of_ones_own_are_found_in_their_folder(stubbed) -> None:
    Path("conf/experiment").mkdir(parents=True)
    text = "# @package _global_\ndefaults: [{override /method: rtn}]\nweight: {bits: 5}\n"
    Path("conf/experiment/mine.yaml").write_text(text)
    run = qexp.run(*TINY, "experiment=mine", config_dir="conf")
    assert run.choices["method"] == "rtn" and run.config["weight"]["bits"] == 5
    assert len(qexp.sweep(*TINY, "experiment=mine", "seed=0,1", config_dir=Path("conf"))) == 2
    with pytest.raises(UserError, match="config_dir: nowhere is no folder"):
        qexp.run(*TINY, config_dir="nowhere")


def test_other_errors_and_interrupts_pass_through(stubbed) -> None:
    with pytest.raises(KeyError, match="a fault of the program"):
        qexp.run(*TINY, "weight.bits=12")
    with pytest.raises(KeyboardInterrupt):
        qexp.run(*TINY, "weight.bits=13")


def test_a_failed_job_is_reported_after_the_others(stubbed) -> None:
    with pytest.raises(UserError, match=r"3 jobs: 2 ran, .* 1 failed[^Z]*bits=11: is not wanted"):
        qexp.sweep(*TINY, "weight.bits=3,11,4")
    kept = qexp.sweep(*TINY, "weight.bits=3,11,4", allow_failures=True)
    assert [run.config["weight"]["bits"] for run in kept] == [3, 4]
    with pytest.raises(UserError, match=r"did you mean weight\.bits"):
        qexp.sweep(*TINY, "weight.bitz=3,4")
    assert qexp.sweep(*TINY, "weight.bits=3,4", "dry_run=true") == []


def test_models_that_are_not_there_are_refused(stubbed) -> None:
    run = qexp.run(*TINY)
    with pytest.raises(UserError, match=r"weights\.safetensors"):
        qexp.load(run.folder)
    with pytest.raises(UserError, match=r"run=nowhere"):
        qexp.load("nowhere")
    with pytest.raises(UserError, match="nowhere: is not a folder"):
        qexp.runs("nowhere")


def test_the_import_is_quick_and_the_names_are_there() -> None:
    assert set(NAMES) == set(qexp.__all__) <= set(dir(qexp))
    with pytest.raises(AttributeError, match="no attribute 'table'"):
        _ = qexp.table
    program = (
        "import sys, qexp\n"
        f"assert all(callable(getattr(qexp, name)) for name in {NAMES})\n"
        "from qexp import load, run, runs, sweep\n"
        "print(sorted({'torch', 'pandas', 'transformers', 'hydra'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
