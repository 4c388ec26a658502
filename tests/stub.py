"""The command with a pipeline that needs no model, run inside this process."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import DictConfig

from qexp import cli, pipeline
from qexp.common.errors import UserError
from qexp.runs import results
from qexp.runs.provenance import Provenance

SMALL = ("model=tiny_llama", "data=synthetic", "calibration=synthetic")


def run(cfg: DictConfig, folder: Path) -> dict[str, float]:
    """Fails in a different way for some bit-widths, else a perplexity that tells the config."""
    if (done := results.read(folder)) is not None:
        return done
    bits = cfg.weight.bits
    if bits == 11:
        raise UserError("weight.bits=11: is not wanted; ask for another")
    if bits == 12:
        raise KeyError("a fault of the program")
    if bits == 13:
        raise KeyboardInterrupt
    provenance = Provenance()
    with provenance.stage("solve"):
        pass
    provenance.add(protocols={"held_out": {"digest": "12345678"}})
    quantized = {} if cfg.method.get("solver") is None else {"weight/bits": bits + 0.5}
    metrics = {"held_out/ppl": 40.0 - bits + cfg.seed, "held_out/ppl_stderr": 0.5, **quantized}
    return results.write(folder, metrics, [], provenance)


@pytest.fixture
def qexp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator:
    """`qexp("weight.bits=3")` in an empty folder; the value is the exit code."""
    monkeypatch.setattr(pipeline, "run", run)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setenv("QEXP_SWEEP", "")

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["qexp", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code in (None, 0, 1, 130)
        return stop.value.code or 0

    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield call
    for handler in list(root.handlers):
        if handler not in handlers:
            root.removeHandler(handler)
            with contextlib.suppress(ValueError):
                handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
