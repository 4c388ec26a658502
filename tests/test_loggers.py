"""One W&B run per job, without account or question; CSV always."""

import csv
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue
from stub import SMALL, qexp  # noqa: F401

from qexp import loggers


def test_csv_is_written_when_something_is_logged(tmp_path) -> None:
    cfg = OmegaConf.create({"logger": {"csv": {"_target_": "qexp.loggers.Csv"}}})
    with loggers.opened(cfg, tmp_path):
        pass
    assert not list(tmp_path.iterdir())
    with loggers.opened(cfg, tmp_path) as log:
        log({"a/ppl": 2.5})
    with (tmp_path / "metrics.csv").open() as file:
        assert list(csv.reader(file)) == [["metric", "value"], ["a/ppl", "2.5"]]


def test_a_missing_value_is_not_logged_as_question_marks(tmp_path) -> None:
    cfg = OmegaConf.create({"logger": {}, "data": {"path": "???"}})
    with pytest.raises(MissingMandatoryValue), loggers.opened(cfg, tmp_path):
        pass


@pytest.mark.filterwarnings("ignore")  # W&B's own
def test_wandb_makes_one_offline_run_for_each_job(qexp, monkeypatch) -> None:  # noqa: F811
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
