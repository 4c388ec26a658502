"""One W&B run per job, without account or question; CSV always."""

import csv
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb
from helpers.folders import folder
from helpers.stub import SMALL
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue

from qexp.report import loggers


def test_csv_is_written_when_something_is_logged(tmp_path) -> None:
    cfg = OmegaConf.create({"logger": {"csv": {"_target_": "qexp.report.loggers.Csv"}}})
    with loggers.opened(cfg, tmp_path):
        pass
    assert not list(tmp_path.iterdir())
    with loggers.opened(cfg, tmp_path) as [logger]:
        logger.log_metrics({"training/loss": 1.5}, step=10)
        logger.log_metrics({"a/ppl": 2.5})
    with (tmp_path / "metrics.csv").open() as file:
        assert list(csv.reader(file)) == [["metric", "value"], ["a/ppl", "2.5"]]


def test_a_missing_value_is_not_logged_as_question_marks(tmp_path) -> None:
    cfg = OmegaConf.create({"logger": {}, "data": {"path": "???"}})
    with pytest.raises(MissingMandatoryValue), loggers.opened(cfg, tmp_path):
        pass


@pytest.mark.filterwarnings("ignore")  # W&B's own
def test_wandb_makes_one_offline_run_for_each_job(qexp, monkeypatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    sweep = ("-m", *SMALL, "logger=wandb", "weight.bits=3,4")
    assert qexp(*sweep) == 0
    runs = list(Path("outputs").glob("*/wandb/offline-run-*/*.wandb"))
    assert len(runs) == len({path.parents[2] for path in runs}) == 2
    assert len(list(Path("outputs").glob("*/metrics.csv"))) == 2
    assert not Path("wandb").exists()
    assert qexp(*sweep) == 0  # answered from disk: nothing new to show
    assert len(list(Path("outputs").glob("*/wandb/offline-run-*"))) == 2


def records(path: Path) -> Iterator:
    """What W&B wrote: a log of LevelDB's format (blocks of 32 KiB, each piece behind checksum,
    length and kind) after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, whole = path.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield Record.FromString(whole)
            whole = b""
    assert whole == b""


@pytest.mark.filterwarnings("ignore")  # W&B's own
def test_wandb_is_given_what_its_users_look_for(tmp_path, monkeypatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = folder(tmp_path, "gptq", errors={"model.layers.0.up": 0.25, "model.layers.1.up": 0.5})
    logger = {"wandb": {"_target_": "qexp.report.loggers.Wandb"}}
    cfg = OmegaConf.create({"logger": logger, "weight": {"bits": 3, "range": {"low": 0}}})
    with loggers.opened(cfg, run, "the-sweep") as [logger]:
        logger.log_metrics({"training/loss": 2.5}, step=10)
        logger.log_metrics({"training/loss": 1.5, "training/validation": 1.75}, step=20)
        logger.log_metrics({"held_out/ppl": 37.0})
    wandb.teardown()  # its process has written everything when it ends
    [path] = run.glob("wandb/offline-run-*/*.wandb")
    found = list(records(path))
    [start] = [record.run for record in found if record.HasField("run")][:1]
    assert (start.run_group, start.display_name, start.project) == ("the-sweep", run.name, "qexp")
    config = {item.key: json.loads(item.value_json) for item in start.config.update}
    assert (config["weight.bits"], config["weight.range.low"]) == (3, 0)
    assert config["choices.method"] == "gptq" and "weight" not in config
    lines = [
        {
            "/".join([*item.nested_key, *[item.key] * bool(item.key)]): json.loads(item.value_json)
            for item in each.item
        }
        for each in (record.history for record in found if record.HasField("history"))
    ]
    assert [line.get("training/loss") for line in lines] == [2.5, 1.5, None, None]
    assert [line.get("training/validation") for line in lines] == [None, 1.75, None, None]
    assert lines[-2]["held_out/ppl"] == 37.0 and lines[-1]["cost/quantize/seconds"] == 1.5
    assert lines[-1]["layers/nrows"] == 2 and lines[-1]["figures/layers/_type"] == "html-file"
    [table] = path.parent.glob("files/media/table/layers*.json")
    assert json.loads(table.read_text())["data"][1] == ["model.layers.1.up", 0.5]
    [figure] = path.parent.glob("files/media/html/figures/layers*.html")
    assert 'title="model.layers.1.up: 0.5"' in figure.read_text()
    [end] = [record.exit.exit_code for record in found if record.HasField("exit")]
    assert end == 0
