"""Fixtures of several test files."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import stub
from helpers.simulated_device import DEVICES, simulated
from hydra import initialize_config_dir

from qexp import cli, pipeline
from qexp.config import location
from qexp.runs import resolvers


@pytest.fixture(scope="module")
def configured() -> Iterator[None]:
    """Hydra can compose conf/."""
    resolvers.register()
    with initialize_config_dir(version_base="1.3", config_dir=str(location.conf())):
        yield


@pytest.fixture
def accelerator() -> Iterator[torch.device]:
    """This machine's accelerator, or a simulated one: for tests with the marker `gpu`."""
    if (found := torch.accelerator.current_accelerator(check_available=True)) is not None:
        yield found
        return
    with simulated():
        yield torch.device(DEVICES[0])


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache."""
    monkeypatch.setenv("QEXP_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def qexp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator:
    """`qexp("weight.bits=3")` in an empty folder; the value is the exit code."""
    monkeypatch.setattr(pipeline, "answer", stub.answer)
    monkeypatch.setattr(pipeline, "run", stub.run)
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
