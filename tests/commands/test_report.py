"""Run folders as tables and as an HTML page."""

import csv
import json
from pathlib import Path

import pytest
from helpers.folders import folder, seeded, some
from helpers.page import Page
from helpers.stub import SMALL

from qexp.cli import command
from qexp.report import plots, tables
from qexp.report.pivot import group
from qexp.runs import finished

TITLE = "held_out/ppl [12345678]"


@pytest.fixture
def sweep(tmp_path, monkeypatch) -> Path:
    """The float model, GPTQ at three bit-widths and a run that failed."""
    monkeypatch.chdir(tmp_path)
    return some(Path("outputs"))


@pytest.fixture
def seeds(sweep) -> Path:
    """RTN too, and a second seed of both at 3 and 4 bits; GPTQ is better at 3."""
    return seeded(sweep)


def test_every_finished_run_is_a_row_and_others_are_named(sweep, capsys) -> None:
    assert command("report", [str(sweep), "--out", "made"]) == 0
    printed = capsys.readouterr()
    assert "left out, it did not finish (weight.bits=11: is not wanted" in printed.err
    lines = Path("made/table.md").read_text().splitlines()
    assert printed.out.startswith(lines[0])
    assert len({len(line) for line in lines[:6]}) == 1  # it is read in terminals too
    assert [line.split("|")[1].strip() for line in lines[2:6]] == ["none", "gptq", "gptq", "gptq"]
    assert "36.00 (se 0.50)" in lines[3] and " 4.50 " in lines[3]
    assert "left out, it did not finish" in Path("made/report.html").read_text()
    with Path("made/table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["weight.bits"] for row in rows] == ["", "4", "3", "2"]
    assert (rows[1][TITLE], rows[1][f"{TITLE} stderr"], rows[1][f"{TITLE} seeds"]) == (
        "36.0",
        "0.5",
        "1",
    )
    assert Path("made/bits_vs_ppl.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_and_the_folder_stand_behind_each_number(qexp) -> None:
    assert qexp("-m", *SMALL, "logger=none", "weight.bits=2,3") == 0
    assert command("report", ["outputs", "--out", "made"]) == 0
    with Path("made/table.csv").open() as file:
        rows = list(csv.DictReader(file))
    written = {path: path.read_bytes() for path in Path("outputs").glob("*/metrics.json")}
    for row in rows:
        metrics = json.loads(Path(row["folders"], "metrics.json").read_text())
        assert metrics["held_out/ppl"] == float(row[TITLE])
        assert row["command"] in Path("made/table.md").read_text()
    assert qexp(*rows[0]["command"].split()[1:]) == 0  # answered: it is the same run
    assert written == {path: path.read_bytes() for path in Path("outputs").glob("*/metrics.json")}


def test_seeds_share_a_cell_and_the_better_method_is_bold(seeds) -> None:
    chosen = ["--columns", "weight.bits", "--metrics", "*/ppl", "--baseline", "method=rtn"]
    assert command("report", [str(seeds), "--out", "made", *chosen]) == 0
    head, _, *lines = Path("made/table.md").read_text().split("\n\n")[0].splitlines()
    assert f"bits=3: {TITLE}" in head and f"bits=4: {TITLE}" in head
    [gptq] = [line for line in lines if "gptq" in line]
    assert "**37.50 ± 0.71 (2)**, Δ -7.4% [-8.6%, -6.2%]" in gptq
    assert "36.50 ± 0.71 (2)**, Δ +0.0%" in gptq
    latex = Path("made/table.tex").read_text()
    assert r"37.50 $\pm$ 0.71 (2)" in latex and r"held\_out/ppl" in latex
    assert latex.count("&") == (1 + len(lines)) * (head.count("|") - 2)


def test_a_checkpoint_that_is_stored_quantized_is_said(seeds) -> None:
    path = seeds / "gptq-2-0" / "provenance.json"
    content = json.loads(path.read_text())
    said = "model=tiny is stored quantized (210 tensors Q4_1 in blocks of 32)"
    types = {"F32": {"tensors": 61, "weights": 9, "block": 1}}
    for grid, there in ({}, False), ({"Q4_1": {"tensors": 210, "weights": 9, "block": 32}}, True):
        path.write_text(json.dumps({**content, "tensor_types": {**types, **grid}}))
        assert command("report", [str(seeds), "--out", "made"]) == 0
        for name in ("report.html", "table.md"):
            assert Path("made", name).read_text().count(said) == there


def test_a_protocol_measured_in_another_dtype_is_said(seeds) -> None:
    path = seeds / "gptq-2-0" / "provenance.json"
    content = json.loads(path.read_text())
    said = "in float32; published numbers are of float16 models"
    for own, there in (("float16", False), ("float32", True)):
        content["protocols"]["held_out"] |= {"dtype": own, "protocol_dtype": "float16"}
        path.write_text(json.dumps(content))
        assert command("report", [str(seeds), "--out", "made"]) == 0
        assert Path("made/report.html").read_text().count(said) == there


def test_a_best_value_at_the_end_of_its_grid_is_said(sweep, capsys) -> None:
    """Of two methods on one grid, one has its best inside and one at the lower end."""
    for damp, one, other in ((0.01, 30, 20), (0.1, 25, 21), (1.0, 28, 22)):
        folder(sweep / "damping", "spqr", 3, ppl=one, damp=damp)
        folder(sweep / "damping", "gptq", 3, ppl=other, damp=damp)
    words = [str(sweep / "damping"), "--out", "made", "--rows", "method", "--columns"]
    words += ["method.damp", "--chosen"]
    assert command("report", [*words, "method.damp"]) == 0
    spqr, gptq = [line for line in capsys.readouterr().out.splitlines() if "is best" in line]
    if "gptq" in spqr:
        spqr, gptq = gptq, spqr
    assert spqr == f"{TITLE}, spqr: method.damp=0.1 is best of 3 from 0.01 to 1"
    assert gptq.startswith("WARNING: ") and "widen the grid beyond 0.01" in gptq
    assert gptq in Path("made/table.md").read_text()
    assert command("report", [*words, "weight.group_size"]) == 1
    assert "no setting has several numbers" in capsys.readouterr().err


def test_two_definitions_never_share_a_column(seeds) -> None:
    path = seeds / "gptq-2-0" / "provenance.json"
    content = json.loads(path.read_text())
    content["protocols"]["held_out"]["digest"] = "another0"
    path.write_text(json.dumps(content))
    assert command("report", [str(seeds), "--out", "made"]) == 0
    with Path("made/table.csv").open() as file:
        rows = list(csv.DictReader(file))
    other = TITLE.replace("12345678", "another0")
    assert sum(row[other] != "nan" for row in rows) == 1
    assert sum(int(row[f"{TITLE} seeds"]) + int(row[f"{other} seeds"]) for row in rows) == 10


def test_what_several_rows_have_in_common_is_tested_by_seed(seeds, capsys) -> None:
    assert command("report", [str(seeds), "--out", "made", "--baseline", "method=rtn"]) == 0
    said = Path("made/table.md").read_text()
    assert f"{TITLE}, gptq: over 2 rows, averaged within each of 2 seeds, -" in said
    (seeds / "rtn-3-0" / "metrics.json").unlink()
    (seeds / "rtn-3-1" / "metrics.json").unlink()
    assert command("report", [str(seeds), "--out", "made", "--baseline", "method=rtn"]) == 0
    assert "averaged within" not in Path("made/table.md").read_text()  # one pair has its own Δ


def test_keys_that_few_look_for_share_a_column(tmp_path) -> None:
    """It says what is unusual, and what tells a row from those that are else labelled like it."""
    for changed in ("", *"abcdef"):
        folder(tmp_path, "gptq", **{key: int(key == changed) for key in "abcdef"})
    folder(tmp_path, "spqr", a=0, b=1)
    folder(tmp_path, "rtn")
    assert command("report", [str(tmp_path)]) == 0
    head, _, *lines = (tmp_path / "table.md").read_text().split("\n\n")[0].splitlines()
    assert head.replace(" ", "").startswith(f"|method|settings|bits|{TITLE.replace(' ', '')}|")
    said = {tuple(cell.strip() for cell in line.split("|")[1:3]) for line in lines}
    assert {("rtn", ""), ("spqr", "b=1"), ("gptq", "a=0, b=0, c=0, d=0, e=0, f=1")} < said
    assert len(said) == 9
    note = "for settings with such a key: method.a=0, method.b=0"
    assert note in (tmp_path / "table.md").read_text()
    with (tmp_path / "table.csv").open() as file:
        assert {row["method.b"] for row in csv.DictReader(file)} == {"0", "1", ""}


def test_many_settings_are_drawn_by_method(tmp_path) -> None:
    """One name for each, and a line through its best; every setting is a mark."""
    for damp in range(plots.CROWD):
        for method, bits in (("gptq", 3), ("rtn", 3), ("rtn", 4)):
            folder(tmp_path, method, bits, ppl=50.1234 - damp - 10 * bits, damp=damp)
    settings = group(finished.collect([tmp_path])[0])
    [column] = settings[0].seeded
    picture = plots.against_bits(settings, [column])
    [axes] = picture.figure.axes
    assert {note.get_text() for note in axes.texts} == {"gptq", "rtn"}
    best = [[3.5, 50.1234 - 30 - plots.CROWD + 1], [4.5, 50.1234 - 40 - plots.CROWD + 1]]
    assert any(line.get_xydata().tolist() == best for line in axes.lines)
    marks = [line for line in axes.lines if line.get_marker() not in ("None", "_", None)]
    assert len(marks) == 3 * plots.CROWD


def test_a_folder_counts_once_however_it_is_named(sweep) -> None:
    found, _ = finished.collect([sweep, *sorted(sweep.glob("[0-9a-f]*")), sweep])
    assert len(found) == 4


def test_a_damaged_run_is_left_out_with_a_note(sweep) -> None:
    path = sorted(sweep.glob("*/metrics.json"))[0]
    path.write_text("{")
    found, notes = finished.collect([sweep])
    assert len(found) == 3
    assert any("metrics.json" in note for note in notes)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--baseline", "method"], "is not key=value"),
        (["--baseline", "method=awq"], "no run has it; there are gptq, none"),
        (["--metrics", "*/acc"], "none fits; there are held_out/ppl"),
        (["--rows", "method"], "add weight.bits"),
        (["--rows", "method,weigth.bits"], "weigth.bits: no run has this key; perhaps weight.bits"),
        (["--over", "sead"], "over sead: no run has this key; perhaps seed"),
    ],
)
def test_a_wish_that_cannot_be_met_is_a_sentence(sweep, capsys, options, said) -> None:
    assert command("report", [str(sweep), "--out", "made", *options]) == 1
    assert said in capsys.readouterr().err
    assert not Path("made").exists()


def test_no_runs_is_a_sentence(tmp_path, capsys) -> None:
    assert command("report", [str(tmp_path)]) == 1
    assert "no finished run" in capsys.readouterr().err
    assert command("report", [str(tmp_path / "absent")]) == 1
    assert "is not a folder" in capsys.readouterr().err


def test_any_metric_or_key_may_be_the_x_axis(sweep) -> None:
    found, _ = finished.collect([sweep])
    assert {run.value("weight.bits") for run in found} == {2.0, 3.0, 4.0}
    assert command("report", [str(sweep), "--out", "made", "--x", "weight.bits"]) == 0
    data = Page(Path("made/report.html")).data
    assert data["quantities"][data["x"]]["name"] == "weight.bits"


def test_a_metric_may_be_zero_or_less(sweep) -> None:
    for path in sweep.glob("*/metrics.json"):
        change = {"suite/change": 0.0 if "none" in str(path) else -0.1, "suite/change_stderr": 0.1}
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert command("report", [str(sweep), "--out", "made", "--metrics", "*/change"]) == 0
    assert "suite/change" in Path("made/table.md").read_text()


def test_an_error_has_the_digits_of_its_number() -> None:
    pairs = [(11329.0, 9226.64), (52.314, 0.8), (0.5, 0.016), (47.9, 15_000.0), (0.0, 0.0)]
    said = [f"{tables.number(mean)} ± {tables.number(error, mean)}" for mean, error in pairs]
    assert said == [
        "1.13e+04 ± 9.23e+03", "52.31 ± 0.80", "0.5000 ± 0.0160", "47.90 ± 1.50e+04", "0 ± 0.0000",
    ]  # fmt: skip
