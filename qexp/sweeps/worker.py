"""Entry point of the further processes of a run: they train with the first and write nothing."""

import sys
from contextlib import suppress
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from qexp import pipeline
from qexp.common import ranks
from qexp.runs import resolvers
from qexp.training.divergence import Diverged
from qexp.training.launch import CONFIG


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
    try:
        join(cfg, folder)
    except Diverged as error:  # the first process reports it
        raise SystemExit(1) from error


if __name__ == "__main__":
    from qexp.sweeps.failures import run_reporting_errors

    sys.exit(run_reporting_errors(main))
