"""Records of runs: what is in them, what is not, and the same tables from them."""

import json
import shutil
from pathlib import Path

import pytest
from helpers.folders import folder

from qexp.cli import command
from qexp.common.files import data_folder
from qexp.report.formats import markdown
from qexp.report.pivot import group, pivot
from qexp.report.tables import RECORD, lay
from qexp.runs import finished, record, results

PRIVATE = ("alice", "example-host", "/home", "Linux-6")


@pytest.fixture
def outputs(tmp_path, monkeypatch) -> Path:
    """GPTQ at three bit-widths and the float model, run by alice on example-host."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QEXP_DATA_DIR", str(tmp_path / "home" / "alice" / "data"))
    for bits in (2, 3, 4):
        private(folder(Path("outputs"), "gptq", bits), bits)
    private(folder(Path("outputs"), "none"), 0)
    return Path("outputs")


def private(path: Path, second: int) -> None:
    """Facts of a machine, in a run's files."""
    data = data_folder()
    assert data is not None
    text = data / "wikitext2" / "test.txt"
    text.parent.mkdir(parents=True, exist_ok=True)
    if not text.exists():
        text.write_text("some text")
    seen = text.stat()
    known = results.provenance(path)
    known |= {
        "finished": f"2026-01-01T00:00:{second:02}+00:00",
        "command": ["/home/alice/qexp/__main__.py", "method=gptq"],
        "machine": {"host": "example-host", "system": "Linux-6.1", "processor": "Z80", "cores": 1},
        "git": {"revision": "abcdef", "dirty": False},
        "inputs": {
            str(text): {"size": seen.st_size, "mtime_ns": seen.st_mtime_ns},
            "/home/alice/model.gguf": {"size": 5, "mtime_ns": 1},
        },
        "note": "read from /home/alice/cache/x",
    }
    results.write_json(path / "provenance.json", known)
    words = path / ".hydra" / "overrides.yaml"
    words.write_text(words.read_text() + "- data.folder=/home/alice/data\n")


def made(outputs: Path) -> list[Path]:
    assert command("record", [str(outputs), "--topic", "bits"]) == 0
    return sorted(Path("docs/records/bits").iterdir())


def test_a_record_holds_what_repeats_the_run_and_nothing_private(outputs, capsys) -> None:
    paths = made(outputs)
    assert len(paths) == 4
    assert "answers no job" in capsys.readouterr().err  # model.gguf is not here any more
    for path in paths:
        text = path.read_text()
        assert not [word for word in PRIVATE if word in text]
        content = json.loads(text)
        assert path.name == f"{content['signature']}.json" and content["format"] == record.FORMAT
        assert content["overrides"][-1] == "data.folder=data"
        known = content["provenance"]
        assert known["machine"] == {"processor": "Z80", "cores": 1}
        assert known["git"] == {"revision": "abcdef", "dirty": False}
        assert known["inputs"]["model.gguf"] == {"size": 5}
        entry = known["inputs"]["wikitext2/test.txt"]
        assert entry["size"] == 9 and len(entry["sha256"]) == 64
        assert known["note"] == "read from x"
        assert list(content) == sorted(content)


def test_a_table_of_records_is_that_of_the_runs(outputs) -> None:
    made(outputs)
    runs, _ = finished.collect([outputs])
    kept, notes = finished.collect([Path("docs/records")])
    assert not notes and len(kept) == 4
    assert not any(run.recorded for run in runs) and all(run.recorded for run in kept)
    for run, other in zip(runs, kept, strict=True):
        assert (run.metrics, run.choices["method"]) == (other.metrics, other.choices["method"])
        assert run.leaves == other.leaves and run.config["weight"] == other.config["weight"]
        assert [each["name"] for each in run.layers] == [each["name"] for each in other.layers]
        assert [float(each["error"]) for each in run.layers] == [
            float(each["error"]) for each in other.layers
        ]
        assert (run.seconds, run.peak("rss")) == (other.seconds, other.peak("rss"))
    tables = [markdown(lay(pivot(group(each)), {})) for each in (runs, kept)]
    assert RECORD in tables[1] and RECORD not in tables[0]
    plain = [" ".join(each.replace(RECORD, "").replace("-", "").split()) for each in tables]
    assert plain[0] == plain[1]


def test_a_run_and_its_record_are_one_run(outputs) -> None:
    paths = made(outputs)
    shutil.copytree("docs/records/bits", "docs/records/again")
    shutil.rmtree(outputs / "gptq-2-0")
    runs, _ = finished.collect([outputs, Path("docs/records")])
    assert sorted(run.recorded for run in runs) == [False, False, False, True]
    assert len(finished.collect([paths[0], paths[1]])[0]) == 2


def test_reports_go_from_records_and_not_into_their_folder(outputs, capsys) -> None:
    made(outputs)
    assert command("report", ["docs/records"]) == 0
    assert "(record)" in Path("outputs/table.md").read_text()
    assert "(record)" in Path("outputs/report.html").read_text()
    assert {path.suffix for path in Path("docs/records/bits").iterdir()} == {".json"}
    capsys.readouterr()
    pair = [str(outputs / "gptq-3-0"), *(str(p) for p in made(outputs) if is_of(p, 3))]
    assert command("diff", pair) == 0
    said = capsys.readouterr().out
    assert "metrics: nothing differs" in said and "layers (0 differ): nothing differs" in said


def is_of(path: Path, bits: int) -> bool:
    words = json.loads(path.read_text())["overrides"]
    return f"weight.bits={bits}" in words


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "cannot be read"),
        ("[1]", "is no record of a run"),
        ('{"format": 99}', "has format 99 and this version of qexp reads 1"),
        ('{"format": 1, "metrics": {}}', "has no choices, config, layers"),
        (None, "is damaged"),
    ],
)
def test_a_damaged_record_is_one_sentence(content, sentence, outputs, capsys) -> None:
    path = made(outputs)[0]
    if content is None:
        content = json.dumps({**json.loads(path.read_text()), "layers": [{"name": 1}]})
    path.write_text(content)
    capsys.readouterr()
    assert command("diff", [str(path), str(path)]) == 1
    said = capsys.readouterr().err.strip()
    assert sentence in said and str(path) in said and len(said.splitlines()) == 1
    runs, notes = finished.collect([Path("docs/records")])
    assert len(runs) == 3 and sentence in notes[0]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["outputs", "--topic", "../x"], "--topic ../x: give one folder name"),
        (["docs", "--topic", "x"], "docs: is not a folder or a record"),
        (["outputs/none-3-0/.hydra", "--topic", "x"], "no finished run is there"),
    ],
)
def test_a_mistake_writes_nothing(arguments, sentence, outputs, capsys) -> None:
    assert command("record", arguments) == 1
    assert sentence in capsys.readouterr().err
    assert not Path("docs").exists()


def test_two_runs_of_one_configuration_are_not_chosen_between(outputs, capsys) -> None:
    shutil.copytree(outputs / "gptq-3-0", outputs / "copy")
    metrics = outputs / "copy" / "metrics.json"
    metrics.write_text(metrics.read_text().replace("37.0", "38.0"))
    assert command("record", [str(outputs), "--topic", "bits"]) == 1
    assert "has the same configuration as" in capsys.readouterr().err
    assert not Path("docs").exists()


def test_layers_of_equal_blocks_are_one_entry_and_come_back_in_order() -> None:
    rows = [
        {"name": f"model.layers.{block}.{part}", "bits": bits, "error": f"{block + 0.1234567}"}
        for block in range(3)
        for part, bits in (("q", "4.5"), ("down", str(3.0 + block)))
    ]
    rows.append({"name": "lm_head", "bits": "8.0", "error": "1e-09"})
    rows.append({"name": "vision.blocks.7.fc", "bits": "8.0", "error": "0.5"})
    entries = record.packed(rows)
    assert [entry["name"] for entry in entries][:2] == ["model.layers.*.q", "model.layers.*.down"]
    assert entries[0]["bits"] == 4.5 and entries[1]["bits"] == [3.0, 4.0, 5.0]
    assert entries[3]["blocks"] == [7]
    back = record.layers({"layers": entries})
    assert {each["name"]: float(each["bits"]) for each in back} == {
        each["name"]: float(each["bits"]) for each in rows
    }
    assert [each["name"] for each in back[:6]] == [each["name"] for each in rows[:6]]
    assert back[0]["error"] == "0.123457"


def test_a_model_of_210_linears_takes_few_bytes(outputs) -> None:
    errors = {
        f"model.layers.{block}.{part}": 0.123456789 / (block + 1)
        for block in range(30)
        for part in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    large = folder(Path("large"), "gptq", errors=errors)
    assert len(record.rendered(record.of(large)["layers"])) < 4000
