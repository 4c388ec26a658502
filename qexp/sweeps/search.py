"""Resumable searches with Optuna."""

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, ListConfig, read_write

from qexp.common import hashes
from qexp.common.errors import UserError
from qexp.common.files import locked
from qexp.sweeps import ledger
from qexp.sweeps.callbacks import errors_exit

REQUEUED = "requeued"  # trials that count by their second try


class Resume(Callback):
    """Prepares the study before the sweeper opens it: `n_trials` becomes the number of remaining
    trials, and a trial whose process was killed comes first."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if config.dry_run:
            return
        with errors_exit():
            node, sweep = config.hydra.sweeper, ledger.sweep_of(config)
            name = node.study_name or f"{sweep.name}-{hashes.code()}"
            study = opened(node, name, Path(config.hydra.sweep.dir))
            take_up(study, sweep, retry=config.retry == "failed")
            ended = [trial for trial in study.trials if trial.state.is_finished()]
            counted = len(ended) - len(study.user_attrs.get(REQUEUED, []))
            with read_write(config.hydra):
                node.study_name = name
                node.n_trials = max(node.n_trials - counted, 0)
                node.max_failure_rate = 0.0 if config.fail_fast else node.max_failure_rate
                if ended and node.sampler.get("seed") is not None:
                    node.sampler.seed += len(
                        study.trials
                    )  # otherwise it proposes the same trials again


def opened(node: DictConfig, name: str, folder: Path) -> Any:
    """The study, created if it does not exist. UserError without Optuna."""
    try:
        import optuna
    except ImportError as error:
        raise UserError(
            "hydra/sweeper=search: optuna is not installed; pip install 'qexp[optuna]'"
        ) from error
    (folder / ledger.FOLDER).mkdir(parents=True, exist_ok=True)
    directions = node.direction if isinstance(node.direction, ListConfig) else [node.direction]
    return optuna.create_study(
        storage=node.storage, study_name=name, directions=list(directions), load_if_exists=True
    )


def take_up(study: Any, sweep: ledger.Sweep, retry: bool) -> None:
    """Queue trials again whose process was killed, and with `retry` those that failed."""
    requeued: list[int] = study.user_attrs.get(REQUEUED, [])
    for trial in study.trials:
        if trial.number in requeued:
            continue
        running, failed = trial.state.name == "RUNNING", trial.state.name == "FAIL"
        if (running and not _alive(trial, sweep)) or (failed and retry):
            if running:
                study.tell(trial.number, state=type(trial.state).FAIL)
            study.enqueue_trial(trial.params)
            requeued.append(trial.number)
    study.set_user_attr(REQUEUED, requeued)


def _alive(trial: Any, sweep: ledger.Sweep) -> bool:
    """Whether a process runs the trial's job or will soon: then there is no entry yet."""
    settings = {**trial.params, **trial.user_attrs}
    entry = sweep.entry([f"{name}={value}" for name, value in settings.items()])
    if not entry.folder:
        return True
    with locked(Path(entry.folder), wait=False) as free:
        return not free
