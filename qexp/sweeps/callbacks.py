"""Hydra callbacks of the command: the record of a sweep, and the dry run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from qexp.common import ranks
from qexp.common.errors import UserError
from qexp.common.files import made
from qexp.config import messages, root_keys
from qexp.sweeps import dry_run
from qexp.sweeps.ledger import VARIABLE, Sweep, plan_of, sweep_of


class Ledger(Callback):
    """Opens the record of a sweep and plans its jobs; a dry run lists them and ends."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if ranks.world() > 1:
            raise SystemExit(
                "torchrun: its processes are for one run and this is a sweep; leave torchrun out, "
                "since a run starts its processes itself (trainer=ddp), or give hydra.mode=RUN"
            )
        with errors_exit():
            root_keys.check(config)
            jobs = plan_of(config)
            sweep = sweep_of(config)
            if config.dry_run:
                self._list(config, jobs, sweep)
            made(Path(config.hydra.sweep.dir), "hydra.sweep.dir")
            os.environ[VARIABLE] = str(sweep)
            sweep.plan(jobs or [], config.retry)

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        with errors_exit():
            root_keys.check(config)
            if config.dry_run:
                self._list(config, [list(config.hydra.overrides.task)], None)
            made(Path(config.hydra.run.dir), "hydra.run.dir")

    def _list(self, config: DictConfig, jobs: list[list[str]] | None, sweep: Sweep | None) -> None:
        print(dry_run.format_plan(config, jobs, sweep))
        raise SystemExit(0)


@contextmanager
def errors_exit() -> Iterator[None]:
    """Turn a user's mistake into SystemExit: Hydra reduces errors of callbacks to warnings."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise SystemExit(messages.message_for(error)) from error
    except UserError as error:
        raise SystemExit(str(error)) from error
