"""A process of a run that is not its first: it trains with the others, and writes nothing."""

import sys
from contextlib import suppress
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from qexp import pipeline, ranks, resolvers
from qexp.faults import Diverged
from qexp.processes import CONFIG


def join(cfg: DictConfig, folder: Path) -> None:
    """The part of a process that is not the first in the run of this configuration."""
    with suppress(ranks.Done):
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
    from qexp.failures import guarded

    sys.exit(guarded(main))
