"""The record of a sweep: gone on with, tried again, shared by processes, foretold."""

import fcntl
import json
from pathlib import Path

import pytest
from helpers import stub
from helpers.stub import SMALL
from omegaconf import DictConfig

from qexp.common import hashes
from qexp.sweeps import dry_run, job, ledger
from qexp.sweeps.app import overrides_last

pytestmark = pytest.mark.usefixtures("qexp")

SWEEP = ("-m", *SMALL, "logger=none")


def entries() -> list[ledger.Entry]:
    [folder] = Path("outputs/.sweeps").iterdir()
    return ledger.Sweep(folder, "").entries()


def states() -> dict[str, str]:
    return {entry.overrides[-1]: entry.status for entry in entries()}


def test_every_job_is_recorded_with_its_cost(qexp) -> None:
    assert qexp(*SWEEP, "weight.bits=4,3,11") == 1
    assert states() == {
        "weight.bits=4": "done",
        "weight.bits=3": "done",
        "weight.bits=11": "failed",
    }
    assert [entry.number for entry in entries()] == [0, 1, 2]
    for entry in entries():
        assert entry.seconds > 0 and entry.started and Path(entry.folder).is_dir()
    assert entries()[0].cost["peak_rss_bytes"] > 0
    assert entries()[2].reason == "weight.bits=11: is not wanted; ask for another"


def test_a_failure_is_told_again_until_another_try_is_asked_for(qexp, capsys) -> None:
    sweep = (*SWEEP, "weight.bits=3,11")
    assert qexp(*sweep) == 1
    [_, failed] = entries()
    capsys.readouterr()
    assert qexp(*sweep) == 1
    assert entries()[1] == failed
    said = capsys.readouterr().err
    assert "2 jobs: 0 ran, 1 answered from disk, 1 failed" in said
    assert "weight.bits=11: is not wanted" in said
    assert qexp(*sweep, "retry=failed") == 1
    assert entries()[1].launch != failed.launch


def test_what_other_code_failed_at_is_tried_again(qexp, monkeypatch) -> None:
    sweep = (*SWEEP, "weight.bits=11")
    assert qexp(*sweep) == 1
    monkeypatch.setattr(hashes, "code", lambda: "changed")
    monkeypatch.setattr("qexp.pipeline.run", lambda cfg, folder, loggers: {"a/ppl": 1.0})
    monkeypatch.setattr("qexp.runs.results.cost", lambda folder: {"seconds": 1.0})
    assert qexp(*sweep) == 0
    assert states() == {"weight.bits=11": "done"}


def test_fail_fast_begins_no_further_job(qexp, capsys) -> None:
    assert qexp(*SWEEP, "fail_fast=true", "weight.bits=3,11,4,5") == 1
    assert "4 jobs: 1 ran, 0 answered from disk, 1 failed, 2 left" in capsys.readouterr().err
    assert list(states().values()) == ["done", "failed", "planned", "planned"]
    assert qexp(*SWEEP, "weight.bits=3,11,4,5") == 1
    assert list(states().values()) == ["done", "failed", "done", "done"]


def test_a_killed_job_is_picked_up_and_a_torn_record_is_no_record(qexp) -> None:
    assert qexp(*SWEEP, "weight.bits=3,4") == 0
    first, second = sorted(Path("outputs/.sweeps").glob("*/*.json"))
    for path in Path("outputs").glob("*/metrics.json"):
        path.unlink()  # as a process leaves them that was killed on the way
    first.write_text(json.dumps({**json.loads(first.read_text()), "status": "running"}))
    second.write_text(second.read_text()[:40])
    assert qexp(*SWEEP, "weight.bits=3,4") == 0
    assert set(states().values()) == {"done"}
    assert len(list(Path("outputs").glob("*/metrics.json"))) == 2


def test_a_job_that_another_process_is_at_comes_last(qexp, monkeypatch, capsys) -> None:
    assert qexp(*SMALL, "weight.bits=3", "--dry-run") == 0
    folder = Path(capsys.readouterr().out.split()[0])
    folder.mkdir(parents=True)
    order = []
    with (folder / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)

        def run_and_free(cfg: DictConfig, place: Path, loggers: list) -> dict[str, float]:
            order.append(cfg.weight.bits)
            if cfg.weight.bits == 4:
                fcntl.flock(other, fcntl.LOCK_UN)
            return stub.run(cfg, place, loggers)

        monkeypatch.setattr("qexp.pipeline.run", run_and_free)
        assert qexp(*SWEEP, "weight.bits=3,4") == 0
    assert order == [4, 3]
    said = capsys.readouterr().err
    assert "another process runs it; left for the end" in said
    assert "2 jobs: 2 ran, 0 answered from disk, 0 failed" in said


def test_flags_may_stand_between_overrides(qexp, capsys) -> None:
    one, *others = SMALL
    assert qexp(one, "-m", *others, "--dry-run", "weight.bits=3,4") == 0
    assert "2 jobs: 2 to run\n" in capsys.readouterr().out
    words = ["a=1", "-m", "--config-dir", "x=y", "~b", "--cfg", "job", "c=2"]
    flags = ["-m", "--config-dir", "x=y", "--cfg", "job"]
    assert overrides_last(words) == [*flags, "a=1", "~b", "c=2"]


def test_what_changes_no_number_makes_no_other_sweep(qexp) -> None:
    assert qexp(*SWEEP, "weight.bits=3,4") == 0
    assert qexp("-m", "weight.bits=3,4", "threads=1", "label=x", *SMALL, "retry=failed") == 0
    assert len(entries()) == 2  # one folder of records, two jobs
    assert qexp(*SWEEP, "weight.bits=3,4", "seed=1") == 0
    assert len(list(Path("outputs/.sweeps").iterdir())) == 2


def test_a_dry_run_tells_what_each_job_would_do_and_does_nothing(qexp, capsys) -> None:
    assert qexp(*SWEEP, "weight.bits=3,4,11", "--dry-run") == 0
    assert "3 jobs: 3 to run\n" in capsys.readouterr().out
    assert not Path("outputs").exists()
    assert qexp(*SWEEP, "save_weights=false", "weight.bits=3,11") == 1
    capsys.readouterr()
    assert qexp(*SWEEP, "save_weights=false", "weight.bits=3,4,11", "--dry-run") == 0
    first, second, third, total, _ = capsys.readouterr().out.splitlines()
    assert "weight.bits=3: answered" in first
    assert "weight.bits=4: to run (about 0 s)" in second
    assert "weight.bits=11: to run" in third  # failed in another sweep
    assert "3 jobs: 2 to run, about 0 s one after another, by the nearest of 1 finished" in total
    assert len(list(Path("outputs").glob("*/metrics.json"))) == 1


def test_an_estimate_is_of_the_runs_that_are_nearest() -> None:
    past = [
        dry_run.FinishedRun({"bits": "3", "model": "large"}, 90.0),
        dry_run.FinishedRun({"bits": "3", "model": "small"}, 5.0),
        dry_run.FinishedRun({"bits": "4", "model": "small"}, 7.0),
    ]
    assert dry_run.estimate({"bits": "2", "model": "small"}, past) == 6.0
    assert dry_run.estimate({"bits": "2", "model": "large"}, past) == 90.0
    assert dry_run.estimate({"bits": "2"}, []) is None
    assert dry_run.estimate({"bits": "2", "method._target_": "training"}, past) is None


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ("retry=always", "retry=always: give failed, or null for no second try"),
        ("method=gtpq", "method=gtpq: there is no such choice; did you mean gptq?"),
    ],
)
def test_a_mistake_ends_a_sweep_before_its_first_job(wrong, sentence, qexp, capsys) -> None:
    assert qexp(*SWEEP, "weight.bits=3,4", wrong) == 1
    assert sentence in capsys.readouterr().err
    assert not list(Path("outputs").glob("*/qexp.log"))


def test_several_metrics_are_a_tuple() -> None:
    metrics = {"weight/bits": 4.0, "a/ppl": 2.0}
    assert job.optimized(["ppl", "weight/bits"], metrics) == (2.0, 4.0)
    assert job.optimized("bits", metrics) == 4.0
