"""Jobs that records answer, and jobs that they do not."""

import json
import shutil
from pathlib import Path

import pytest
from hydra import compose
from omegaconf import DictConfig

from qexp import pipeline
from qexp.common.errors import UserError
from qexp.common.modules import Sources
from qexp.models.export import export
from qexp.runs import record, recorded, results

pytestmark = pytest.mark.usefixtures("configured")

SMALL = ["model=tiny_llama", "method=rtn", "calibration=none", "weight.group_size=32"]
SMALL += ["eval.held_out.length=16", "eval.held_out.limit=1", "save_weights=false", "logger=none"]


def composed(*words: str) -> DictConfig:
    return compose("config", [*SMALL, *words], return_hydra_config=False)


def made(folder: Path, *words: str) -> DictConfig:
    """The configuration of a run that was recorded and whose folder is gone."""
    cfg = composed(*words)
    settings = compose("config", [*SMALL, *words], return_hydra_config=True)
    results.write_config(folder, cfg, settings)
    pipeline.run(cfg, folder)
    content = record.of(folder)
    record.write(Path("docs/records/topic") / f"{content['signature']}.json", content)
    return cfg


@pytest.fixture(scope="module")
def done(tmp_path_factory, configured) -> Path:
    """A folder in which a run on a text of the data folder was recorded."""
    top = tmp_path_factory.mktemp("machine")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(top)
        patch.setenv("QEXP_DATA_DIR", str(top / "data"))
        patch.setenv("QEXP_CACHE_DIR", str(top / "cache"))
        (top / "data").mkdir()
        (top / "data" / "text.txt").write_text("The cat sat on the mat.\n" * 100)
        made(top / "run", *words(top))
    return top


def words(top: Path) -> list[str]:
    return ["data=local", f"data.path={top}/data/text.txt"]


@pytest.fixture
def here(done, tmp_path, monkeypatch) -> Path:
    """Another machine, to which the records and the data were copied; no job runs there."""
    shutil.copytree(done / "docs", tmp_path / "docs")
    shutil.copytree(done / "data", tmp_path / "data")  # new times
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QEXP_DATA_DIR", str(tmp_path / "data"))
    return tmp_path


def the_record() -> Path:
    [path] = Path("docs/records").rglob("*.json")
    return path


def edited(**changes: object) -> None:
    path = the_record()
    content = json.loads(path.read_text())
    content["provenance"] |= changes
    record.write(path, content)


def test_a_record_answers_on_another_machine(here, done, caplog) -> None:
    cfg = composed(*words(here))
    with caplog.at_level("INFO"):
        answer = pipeline.answer(cfg, here / "outputs" / "x")
    assert answer is not None and answer.metrics == results.metrics(done / "run")
    assert answer.place == the_record() and answer.cost["seconds"] > 0
    assert f"answered from record {the_record()}" in caplog.text
    assert recorded.lookup(cfg).path == the_record()


def test_its_text_names_no_place(here, done) -> None:
    text = the_record().read_text()
    assert str(done) not in text and "/tmp" not in text
    content = json.loads(text)
    assert content["config"]["data"]["path"] == "text.txt"
    assert list(content["provenance"]["inputs"]) == ["text.txt"]


@pytest.mark.parametrize(
    ("words_", "reason"),
    [
        (["save_weights=true"], "keeps no weights; it answers with save_weights=false"),
        (["records=null"], ""),
        (["weight.bits=3"], ""),
        (["records=elsewhere"], ""),
    ],
)
def test_other_jobs_are_not_answered(words_, reason, here, caplog) -> None:
    cfg = composed(*words(here), *words_)
    with caplog.at_level("INFO"):
        assert pipeline.answer(cfg, here / "outputs" / "x") is None
    assert reason in caplog.text and (reason or "record" not in caplog.text)


def test_other_input_files_are_not_answered(here) -> None:
    cfg = composed(*words(here))
    text = here / "data" / "text.txt"
    text.write_text(text.read_text().replace("cat", "cow"))  # of equal size
    assert pipeline.answer(cfg, here / "x") is None
    assert "has another content here" in recorded.lookup(cfg).reason
    assert "another content" in recorded.lookup(cfg, [text]).reason
    text.write_text("shorter")
    assert "its input files are others" in recorded.lookup(cfg, [text]).reason
    text.unlink()
    assert "if 1 input file will be the same" in recorded.lookup(cfg).note


def test_a_path_whose_content_is_not_compared_is_not_answered(here, monkeypatch) -> None:
    monkeypatch.delenv("QEXP_DATA_DIR")
    cfg = composed(*words(here))
    assert pipeline.answer(cfg, here / "x") is not None  # the text lies at its path
    found = recorded.lookup(cfg, [])
    assert found.path is None and "cannot be compared" in found.reason


def test_other_code_is_not_answered(here, monkeypatch) -> None:
    cfg = composed(*words(here))
    monkeypatch.setattr(Sources, "digest", lambda *_: "other")
    assert "other code of the modules that it uses" in recorded.lookup(cfg).reason


def test_what_was_not_hashed_is_not_answered(here) -> None:
    edited(inputs={"text.txt": {"size": 2400}})
    assert "has no hash of text.txt" in recorded.lookup(composed(*words(here))).reason


def test_another_torch_and_device_are_shown(here) -> None:
    edited(versions={"torch": "1.0"}, device="cuda")
    found = recorded.lookup(composed(*words(here)))
    assert found.path is not None
    assert "last digits may differ: device cuda, here cpu; torch 1.0, here " in found.note


@pytest.mark.parametrize("content", ["{", '{"format": 2}', None])
def test_a_damaged_record_is_a_reason_to_run(content, here) -> None:
    edited(inputs=3)
    if content is not None:
        the_record().write_text(content)
    found = recorded.lookup(composed(*words(here)))
    assert found.path is None and str(the_record()) in found.reason


def test_a_record_is_no_model(here) -> None:
    with pytest.raises(UserError, match=r"^run=docs/records/.*json: is a file, and a record keeps"):
        results.config(str(the_record()))
    with pytest.raises(UserError, match="a record keeps no weights"):
        export(the_record(), here / "model")
