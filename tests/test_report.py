"""A table of what stands in folders, and its picture."""

import csv
import json
import math
from pathlib import Path

import pytest
from stub import SMALL, qexp  # noqa: F401

from qexp import report, runs


@pytest.fixture
def sweep(qexp) -> Path:  # noqa: F811
    assert qexp("-m", *SMALL, "logger=none", "method=gptq", "weight.bits=2,3,11,4") == 1
    assert qexp(*SMALL, "logger=none", "method=none") == 0
    return Path("outputs")


def test_every_finished_run_is_a_row_and_others_are_named(sweep, capsys) -> None:
    assert report.main([str(sweep), "--out", "made"]) == 0
    printed = capsys.readouterr()
    assert "left out, it did not finish (weight.bits=11: is not wanted" in printed.err
    lines = Path("made/table.md").read_text().splitlines()
    assert printed.out.startswith(lines[0])
    assert len({len(line) for line in lines}) == 1  # it is read in terminals too
    assert [line.split("|")[3].strip() for line in lines[2:]] == ["none", "gptq", "gptq", "gptq"]
    assert "36.00 ± 0.50" in lines[3] and " 4.50 " in lines[3]
    with Path("made/table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["weight"] for row in rows][1:] == [f"int {bits} g64 asym" for bits in (4, 3, 2)]
    assert rows[1]["held_out/ppl [12345678]"] == "36.0"
    assert rows[1]["held_out/ppl [12345678] stderr"] == "0.5"
    assert Path("made/bits_vs_ppl.png").read_bytes().startswith(b"\x89PNG")


def test_two_definitions_never_share_a_column(sweep) -> None:
    path = sorted(sweep.glob("*/provenance.json"))[0]
    content = json.loads(path.read_text())
    content["protocols"]["held_out"]["digest"] = "another0"
    path.write_text(json.dumps(content))
    found, _ = runs.collect([sweep])
    rows = report.table(found)
    titles = {
        title for title in rows[0] if title.startswith("held_out/ppl") and "stderr" not in title
    }
    assert titles == {"held_out/ppl [12345678]", "held_out/ppl [another0]"}
    assert all(sum(not math.isnan(row[title]) for title in titles) == 1 for row in rows)


def test_a_folder_counts_once_however_it_is_named(sweep) -> None:
    found, _ = runs.collect([sweep, *sorted(sweep.glob("[0-9a-f]*")), sweep])
    assert len(found) == 4


def test_a_damaged_run_is_left_out_with_a_note(sweep) -> None:
    path = sorted(sweep.glob("*/metrics.json"))[0]
    path.write_text("{")
    found, notes = runs.collect([sweep])
    assert len(found) == 3
    assert any("metrics.json" in note for note in notes)


def test_no_runs_is_a_sentence(tmp_path, capsys) -> None:
    assert report.main([str(tmp_path)]) == 1
    assert "no finished run" in capsys.readouterr().err
    assert report.main([str(tmp_path / "absent")]) == 1
    assert "is not a folder" in capsys.readouterr().err


def test_any_metric_or_key_may_be_the_x_axis(sweep) -> None:
    found, _ = runs.collect([sweep])
    assert {run.value("weight.bits") for run in found} == {2.0, 3.0, 4.0}
    assert report.main([str(sweep), "--out", "made", "--x", "weight.bits"]) == 0
