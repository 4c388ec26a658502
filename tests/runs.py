"""Whole runs inside this process, from overrides to the files of a folder."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from qexp import pipeline
from qexp.config import location
from qexp.runs import resolvers


@pytest.fixture(scope="module", autouse=True)
def _configured():
    """For every test of a module that imports it."""
    resolvers.register()
    with initialize_config_dir(version_base="1.3", config_dir=str(location.conf())):
        yield


def run(folder: Path, *overrides: str, small: list[str] | tuple[str, ...]) -> dict[str, float]:
    """The metrics; the folder holds what the command leaves. `small`: overrides that come first."""
    cfg = compose("config", [*small, *overrides])
    (folder / ".hydra").mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, folder / ".hydra" / "config.yaml")
    return pipeline.run(cfg, folder)
