"""A folder answers for its configuration, or says why not."""

import csv
import json
import logging
import math
from dataclasses import dataclass

import pytest

from qexp.common import hashes, modules
from qexp.common.errors import UserError
from qexp.runs import results
from qexp.runs.provenance import Provenance


@dataclass(frozen=True)
class Row:
    """The columns of a Record."""

    name: str = "layers.0.q"
    rows: int = 4
    columns: int = 8
    bits: float = 4.5
    paper_bits: float | None = None
    option: int | None = None
    error_before: float = 2.0
    error: float = 1.0
    damp: float = 0.01
    seconds: float = 0.1


def written(folder, **metrics: float) -> Provenance:
    provenance = Provenance()
    with provenance.stage("solve"):
        sum(range(1000))
    results.write(folder, metrics or {"a/ppl": 2.5, "weight/bits": 4.5}, [Row(), Row()], provenance)
    return provenance


def test_what_is_written_is_read(tmp_path) -> None:
    written(tmp_path)
    assert results.read(tmp_path) == {"a/ppl": 2.5, "weight/bits": 4.5}
    with (tmp_path / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 and rows[0]["bits"] == "4.5"
    past = results.provenance(tmp_path)
    assert past["code"] == hashes.code()
    assert past["modules"]["digest"] == modules.sources().digest(["qexp.pipeline"])
    assert past["stages"]["solve"]["seconds"] >= 0
    assert past["stages"]["solve"]["peak_rss_bytes"] > 1e6
    assert past["versions"]["torch"]


def test_a_configuration_is_what_its_file_holds_now(tmp_path) -> None:
    written(tmp_path)
    path = tmp_path / ".hydra" / "config.yaml"
    path.parent.mkdir()
    path.write_text("seed: 1")
    results.config(str(tmp_path)).seed = 5  # the caller's own
    assert results.config(str(tmp_path)).seed == 1
    path.write_text("seed: 23")
    assert results.config(str(tmp_path)).seed == 23


def test_without_layers_the_table_has_its_header(tmp_path) -> None:
    results.write(tmp_path, {"a/ppl": 1.0}, [], Provenance())
    assert (tmp_path / "layers.csv").read_text().strip() == ",".join(results.COLUMNS)


def test_numbers_that_are_not_finite_survive(tmp_path) -> None:
    written(tmp_path, **{"a/ppl": math.inf, "a/ppl_stderr": math.nan})
    answer = results.read(tmp_path)
    assert answer is not None and math.isinf(answer["a/ppl"]) and math.isnan(answer["a/ppl_stderr"])


def test_a_metric_that_is_no_number_is_refused_before_anything_is_written(tmp_path) -> None:
    with pytest.raises(TypeError):
        results.write(tmp_path, {"a/ppl": None}, [], Provenance())
    assert not list(tmp_path.iterdir())


def test_an_unfinished_folder_does_not_answer(tmp_path) -> None:
    assert results.read(tmp_path) is None
    written(tmp_path)
    (tmp_path / "metrics.json").unlink()
    assert results.read(tmp_path) is None


def test_changed_code_runs_again(tmp_path, monkeypatch, caplog) -> None:
    written(tmp_path)
    monkeypatch.setattr(modules.Sources, "digest", lambda *_: "another")
    with caplog.at_level(logging.INFO, "qexp"):
        assert results.read(tmp_path) is None
    assert "the code has changed" in caplog.text


def test_changed_inputs_run_again(tmp_path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some")
    provenance = Provenance()
    provenance.read_files([text])
    folder = tmp_path / "run"
    results.write(folder, {"a/ppl": 1.0}, [], provenance)
    assert results.read(folder, [text]) == results.read(folder) == {"a/ppl": 1.0}
    assert results.stale(folder, [text, tmp_path / "more.txt"]) == "it reads other files now"
    assert results.stale(folder, needs=["weights.safetensors"]) == "it has no weights.safetensors"
    text.write_text("other")
    assert "text.txt has changed" in str(results.stale(folder))


@pytest.mark.parametrize("content", ["", "{", "[1]"])
def test_a_damaged_folder_runs_again(tmp_path, content) -> None:
    written(tmp_path)
    (tmp_path / "metrics.json").write_text(content)
    assert results.read(tmp_path) is None
    with pytest.raises(UserError, match=r"metrics\.json"):
        results.metrics(tmp_path)


@pytest.mark.parametrize("file", ["layers.csv", "provenance.json", "metrics.json"])
def test_a_full_disk_leaves_no_finished_run(tmp_path, monkeypatch, file) -> None:
    written(tmp_path)  # also what an earlier run left must not pass for the new one
    replace = results.atomic.__globals__["os"].replace

    def full(source, target) -> None:
        if target.name == file:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UserError, match=f"{file}: cannot be written"):
        written(tmp_path)
    assert not (tmp_path / "metrics.json").exists()
    assert not list(tmp_path.glob(".*tmp*"))


def test_the_provenance_adds_up_stages_and_facts() -> None:
    provenance = Provenance()
    for _ in range(2):
        with provenance.stage("load"):
            bytes(50_000_000)
    provenance.add(protocols={"a": 1}, device="cpu")
    provenance.add(protocols={"b": 2})
    content = json.loads(json.dumps(provenance.dict()))
    assert content["protocols"] == {"a": 1, "b": 2} and content["device"] == "cpu"
    assert list(content["stages"]) == ["load"]
