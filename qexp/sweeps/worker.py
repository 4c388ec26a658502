"""A process of a run that is not its first: it trains with the others, and writes nothing."""

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
    """The part of a process that is not the first in the run of this configuration."""
    with suppress(ranks.Done):
        if pipeline.answer(cfg, folder) is None:
            pipeline.run(cfg, folder)


def main() -> None:
    """`python -m qexp.worker FOLDER`: join the run whose configuration the folder holds."""
    resolvers.register()
    folder = Path(sys.argv[1])
    cfg = OmegaConf.load(folder / CONFIG)
    assert isinstance(cfg, DictConfig)
    try:
        join(cfg, folder)
    except Diverged as error:  # which the first one says
        raise SystemExit(1) from error


if __name__ == "__main__":
    from qexp.sweeps.failures import run_reporting_errors

    sys.exit(run_reporting_errors(main))
