"""Entry point of the further processes of a run: they compute with the first and write nothing."""

import logging
import sys
import time
from contextlib import suppress
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from qexp import pipeline
from qexp.common import ranks
from qexp.common.launch import CONFIG
from qexp.runs import resolvers

PATIENCE = 10.0  # seconds in which the first process ends this one, if it reports the same error


def join(cfg: DictConfig, folder: Path) -> None:
    """Run this configuration as a process that is not the first."""
    with suppress(ranks.Done):
        if pipeline.answer(cfg, folder) is None:
            pipeline.run(cfg, folder)


def main() -> None:
    """`python -m qexp.sweeps.worker FOLDER`: join the run whose configuration the folder holds."""
    resolvers.register()
    folder = Path(sys.argv[1])
    cfg = OmegaConf.load(folder / CONFIG)
    assert isinstance(cfg, DictConfig)
    logging.basicConfig(level=logging.ERROR)  # the first process logs what all of them meet
    try:
        join(cfg, folder)
    except Exception:
        time.sleep(PATIENCE)
        raise


if __name__ == "__main__":
    from qexp.sweeps.failures import run_reporting_errors

    sys.exit(run_reporting_errors(main))
