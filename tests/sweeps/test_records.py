"""A sweep that goes on from the records of another machine."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from qexp import pipeline
from qexp.cli import command
from qexp.pipeline import answer, run  # before the fixture `qexp` replaces them

SMALL = ("model=tiny_llama", "data=synthetic", "calibration=none", "data.seed=0")
SMALL += ("weight.group_size=32",)
SMALL += ("eval.held_out.length=16", "eval.held_out.limit=2", "progress=false", "logger=none")
SWEEP = ("-m", *SMALL, "save_weights=false", "method=rtn", "weight.bits=3,4")
SEEDS, MORE = "seed=0,1,2", "seed=0,1,2,3,4,5"


@pytest.fixture
def real(qexp, monkeypatch, own_cache):
    """The command with its pipeline."""
    monkeypatch.setattr(pipeline, "answer", answer)
    monkeypatch.setattr(pipeline, "run", run)
    return qexp


def numbers(path: Path) -> dict[str, list[str]]:
    with path.open() as file:
        rows = list(csv.DictReader(file))
    kept = ("difference", "seeds", "ppl", "deviation", "bits", "weight.bits")
    return {row["weight.bits"]: [row[k] for k in row if k.endswith(kept)] for row in rows}


@pytest.mark.slow
def test_six_jobs_of_twelve_from_records_make_one_table(
    real, tmp_path, monkeypatch, capsys
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for machine in (one, other):
        machine.mkdir()
    monkeypatch.chdir(one)
    assert real(*SWEEP, SEEDS) == 0
    assert command("record", ["outputs", "--topic", "bits"]) == 0

    monkeypatch.chdir(other)
    shutil.copytree(one / "docs", "docs")
    capsys.readouterr()
    assert real(*SWEEP, MORE, "--dry-run") == 0
    said = capsys.readouterr().out
    assert said.count(": answered from record docs/records/bits/") == 6
    assert "12 jobs: 6 to run, about" in said and "by the nearest of 6 finished runs" in said
    assert not Path("outputs").exists()

    assert real(*SWEEP, MORE) == 0
    said = capsys.readouterr().err
    assert "12 jobs: 6 ran, 6 answered from disk (6 from records), 0 failed" in said
    assert len(list(Path("outputs").glob("*/metrics.json"))) == 6
    assert command("report", ["outputs", "docs/records", "--out", "both"]) == 0

    monkeypatch.chdir(one)
    assert real(*SWEEP, MORE) == 0  # all of them on one machine
    assert command("report", ["outputs", "--out", "all"]) == 0
    table = numbers(other / "both" / "table.csv")
    assert len(table) == 2 and table == numbers(one / "all" / "table.csv")
    assert "(6)" in (other / "both" / "table.md").read_text()


def test_a_record_that_does_not_answer_says_why(real, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert real(*SWEEP, "seed=0", "weight.bits=3") == 0
    assert command("record", ["outputs", "--topic", "bits"]) == 0
    shutil.rmtree("outputs")
    words = [word for word in SWEEP if "save_weights" not in word]
    capsys.readouterr()
    assert real(*words, "seed=0", "weight.bits=3", "--dry-run") == 0
    assert "to run (docs/records/" in (said := capsys.readouterr().out)
    assert "keeps no weights; it answers with save_weights=false) (about" in said
    [path] = Path("docs/records").rglob("*.json")
    content = json.loads(path.read_text())
    content["provenance"]["modules"]["digest"] = "other"
    path.write_text(json.dumps(content))
    assert real(*SWEEP, "seed=0", "weight.bits=3", "--dry-run") == 0
    assert "was made by other code of the modules that it uses" in capsys.readouterr().out
    assert real(*SWEEP, "seed=0", "weight.bits=3", "records=3") == 1
    assert "records=3: give the folder of records, or null" in capsys.readouterr().err
