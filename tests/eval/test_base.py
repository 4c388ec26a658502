"""Whole runs whose evaluators look at the float model before it is quantized."""

import math
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from qexp import pipeline
from qexp.config import location
from qexp.eval.continuations import FILE
from qexp.runs import resolvers

SMALL = [
    *("model=tiny_llama", "data=synthetic", "method=rtn", "weight.group_size=32", "weight.bits=3"),
    *("eval=[held_out,against_float,continuations]", "calibration.sequences=2"),
    *("eval.held_out.length=64", "eval.held_out.limit=4", "eval.continuations.length=8"),
    *("eval.against_float.protocol.length=64", "eval.against_float.protocol.limit=4"),
]


def run(folder: Path, overrides: list[str]) -> dict[str, float]:
    resolvers.register()
    with initialize_config_dir(version_base="1.3", config_dir=str(location.conf())):
        cfg = compose("config", overrides)
        (folder / ".hydra").mkdir(parents=True)
        OmegaConf.save(cfg, folder / ".hydra" / "config.yaml")
        return pipeline.run(cfg, folder)


def test_a_reloaded_run_is_compared_with_the_float_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QEXP_CACHE_DIR", str(tmp_path / "cache"))
    first = run(tmp_path / "first", SMALL)
    assert first["against_float/kl"] > 0.01
    assert (tmp_path / "first" / FILE).is_file()
    again = run(tmp_path / "again", ["model=from_run", f"run={tmp_path / 'first'}"])
    for key, value in again.items():
        assert value == pytest.approx(first[key], nan_ok=True)
    plain = run(tmp_path / "plain", [*SMALL, "method=none"])
    assert plain["against_float/kl"] == 0 and plain["continuations/identical"] == 1
    name = "synthetic_raw_64x4/ppl"
    change = first[name] / plain[name]
    assert first["against_float/loss_change"] == pytest.approx(math.log(change), abs=1e-5)
