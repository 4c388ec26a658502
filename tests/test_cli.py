"""The command: what it prints, what it leaves, how it ends."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.stub import SMALL

from qexp.common.errors import UserError
from qexp.config import location
from qexp.sweeps import job

pytestmark = pytest.mark.usefixtures("qexp")


def folders() -> list[Path]:
    return sorted(path.parent for path in Path("outputs").glob("*/metrics.json"))


def test_a_run_is_its_folder_and_is_answered_from_it(qexp, capsys) -> None:
    assert qexp(*SMALL, "weight.bits=3") == 0
    [folder] = folders()
    for name in ("metrics.json", "provenance.json", "layers.csv", "qexp.log", ".hydra/config.yaml"):
        assert (folder / name).exists()
    written = (folder / "metrics.json").stat().st_mtime_ns
    assert "held_out/ppl 37.00 (se 0.50)" in capsys.readouterr().err
    assert qexp("weight.bits=3", *SMALL, "logger=none", "progress=false", "label=again") == 0
    assert folders() == [folder]
    assert (folder / "metrics.json").stat().st_mtime_ns == written
    assert "answered from disk" in capsys.readouterr().err


def test_a_failing_job_takes_no_other_with_it(qexp, capsys) -> None:
    assert qexp("-m", *SMALL, "logger=none", "weight.bits=3,11,12,4") == 1
    assert len(folders()) == 2
    said = capsys.readouterr().err
    assert "4 jobs: 2 ran, 0 answered from disk, 2 failed" in said
    assert "weight.bits=11: is not wanted" in said
    assert said.count("Traceback") == 1  # of the KeyError alone
    reasons = [json.loads(path.read_text()) for path in Path("outputs").glob("*/failure.json")]
    assert {"weight.bits=11", "weight.bits=12"} == {each["overrides"][-1] for each in reasons}
    assert qexp("-m", *SMALL, "logger=none", "weight.bits=3,4,5") == 0
    assert "3 jobs: 1 ran, 2 answered from disk, 0 failed" in capsys.readouterr().err


def test_an_interrupt_ends_a_sweep_with_what_is_finished(qexp, capsys) -> None:
    assert qexp("-m", *SMALL, "logger=none", "weight.bits=3,13,4") == 130
    assert len(folders()) == 1
    said = capsys.readouterr().err
    assert "interrupted" in said
    assert "3 jobs: 1 ran, 0 answered from disk, 0 failed, 2 left" in said
    assert "Traceback" not in said


def test_a_success_removes_the_failure_before_it(qexp, monkeypatch) -> None:
    assert qexp(*SMALL, "logger=none", "weight.bits=11") == 1
    [failure] = Path("outputs").glob("*/failure.json")
    monkeypatch.setattr("qexp.pipeline.run", lambda cfg, folder, loggers: {"a/ppl": 1.0})
    assert qexp(*SMALL, "logger=none", "weight.bits=11") == 0
    assert not failure.exists()


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ("weight.bitz=3", "weight.bitz: there is no such key; did you mean weight.bits?"),
        ("modle=gpt2", "modle: there is no such key; did you mean model?"),
        ("experimnt=demo", "experimnt: there is no such key; did you mean experiment?"),
        ("method=gtpq", "method=gtpq: there is no such choice; did you mean gptq?"),
        ("weight.bits=2,3", "weight.bits=2,3: several values need -m (one run for each)"),
        ("data=local", "data.path: has no value; set it with data.path=VALUE"),
        ("model=from_run", "run: has no value; give the folder of a finished run, run=outputs/…"),
        ("weight.bits=11", "weight.bits=11: is not wanted; ask for another"),
    ],
)
def test_a_mistake_is_answered_with_one_sentence(wrong, sentence, qexp, capsys) -> None:
    assert qexp("model=tiny_llama", "calibration=synthetic", wrong) == 1
    said = capsys.readouterr().err.strip()
    assert said.endswith(sentence)
    assert len(said.splitlines()) == 1
    assert not folders()


@pytest.mark.parametrize("wrong", ["threads=-2", "dry_run=maybe", "retry=x", "optimize=3"])
@pytest.mark.parametrize("many", [[], ["-m"]])
def test_a_wrong_value_at_the_root_is_refused_before_anything_runs(
    wrong,
    many,
    qexp,
    capsys,
) -> None:
    assert qexp(*many, *SMALL, "logger=none", wrong) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"qexp: {wrong}: give ") and len(said.splitlines()) == 1
    assert not Path("outputs").exists()


@pytest.mark.parametrize("many", [[], ["-m"]])
@pytest.mark.parametrize("folder", ["/proc/x", "taken", "taken/below"])
def test_a_folder_that_cannot_be_made_is_one_sentence(folder, many, qexp, capsys) -> None:
    Path("taken").write_text("a file")
    key = "hydra.sweep.dir" if many else "hydra.run.dir"
    assert qexp(*many, *SMALL, "logger=none", f"{key}={folder}") == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"qexp: {key}={folder}: no files can be written there (")
    assert len(said.splitlines()) == 1
    assert Path("taken").read_text() == "a file" and not folders()


def test_a_file_where_the_folder_of_a_job_was_to_be_is_one_sentence(qexp, capsys) -> None:
    Path("outputs").mkdir()
    Path("outputs/taken").write_text("a file")
    assert qexp("-m", *SMALL, "logger=none", "hydra.sweep.subdir=taken") == 1
    said = capsys.readouterr().err
    assert "outputs/taken: File exists; " in said and "Traceback" not in said


def test_a_trace_is_shown_when_asked_for(qexp, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert qexp(*SMALL, "weight.bitz=3") == 1
    assert "Traceback" in capsys.readouterr().err
    assert qexp(*SMALL, "weight.bits=11") == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_full_disk_under_others_feet_is_one_sentence(qexp, monkeypatch, capsys) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("qexp.pipeline.run", full)
    assert qexp(*SMALL, "logger=none") == 1
    said = capsys.readouterr().err
    assert "No space left on device; free space" in said and "Traceback" not in said


def test_the_optimized_metric_is_the_first_perplexity_or_the_one_named() -> None:
    metrics = {"weight/bits": 4.0, "a/ppl": 2.0, "b/ppl": 3.0}
    assert job.optimized(None, metrics) == 2.0
    assert job.optimized("b/ppl", metrics) == 3.0
    assert job.optimized(None, {"weight/bits": 4.0}) is None
    with pytest.raises(UserError, match="did you mean weight/bits"):
        job.optimized("weight/bit", metrics)


def test_the_line_of_a_finished_run_has_no_error_where_there_is_none() -> None:
    metrics = {"a/ppl": 2.0, "a/ppl_stderr": 0.5, "b/ppl": 3.0, "b/ppl_stderr": float("nan")}
    assert job.headline(metrics) == "a/ppl 2.00 (se 0.50), b/ppl 3.00"


def test_help_lists_the_choices_and_loads_nothing_heavy(tmp_path) -> None:
    program = (
        "import sys, qexp.cli\n"
        "try: sys.argv = ['qexp', '--help']; qexp.cli.main()\n"
        "finally: print(sorted({'torch', 'transformers', 'wandb'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(location.conf().parent)},
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert "method: " in done.stdout and "smollm2" in done.stdout
