"""One trainer for every method that trains."""

import logging
import shutil
import signal
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch.multiprocessing.spawn import ProcessRaisedException

from qexp import progress
from qexp.course import Course, Pace, Training
from qexp.errors import UserError
from qexp.sharded import Sharded
from qexp.task import Task

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trainer:
    """How long and on what: steps of the optimizer, of `accumulate` times `sequences` sequences.

    every: steps between validations (and checkpoints, lines of the log). patience: stop after so
    many validations without a better one; null trains to the end. The best weights are kept where
    there is validation data. precision: of forward and backward, `32-true` or `bf16-mixed`.
    recompute: activations of a block are computed again in backward. strategy: as Lightning names
    them, but that `fsdp`, and `fsdp_fork` like `ddp_fork`, are `Sharded`. devices: how many.
    """

    steps: int = 200
    sequences: int = 4
    accumulate: int = 1
    every: int = 50
    patience: int | None = None
    precision: str = "32-true"
    recompute: bool = False
    strategy: str = "auto"
    devices: int = 1

    def __post_init__(self) -> None:
        for key in ("steps", "sequences", "accumulate", "every", "devices"):
            if getattr(self, key) < 1:
                raise UserError(f"trainer.{key}={getattr(self, key)} must be at least 1.")

    def fit(self, course: Course) -> list[dict[str, float]]:
        """Train; the log's lines. Leaves the best (else the last) weights in the model, in the
        modes and on the device that it had."""
        if not any(course.parameters.values()):
            raise UserError("method.trained: nothing is left to train; choose another set.")
        task, device = course.task, course.task.device
        with tempfile.TemporaryDirectory() as scratch, _quiet(), _mode(task, self.recompute):
            folder = Path(scratch) if course.folder is None else course.folder
            kept = folder / f"training-{course.identity}"
            pace = Pace(self.steps, self.every, self.accumulate, self.sequences)
            module = Training(course, pace, folder / "training.csv")
            best = _checkpoint(kept, "best", monitor="validation")
            # Not `save_last`, which Lightning writes only where it also saves by the monitor.
            # It comes second, so that it knows what `best` made of the same leg.
            callbacks: list[Callback] = [best] if course.validation else []
            callbacks.append(_checkpoint(kept, "last"))
            if self.patience is not None and course.validation:
                callbacks.append(
                    EarlyStopping(
                        "validation",
                        patience=self.patience,
                        strict=False,  # a resumed run ends its leg once more, without the metric
                        check_on_train_epoch_end=True,
                    )
                )
            last = kept / "last.ckpt"
            if last.exists():
                log.info("training goes on from %s", last)
            cpu = device.type == "cpu"
            trainer = L.Trainer(
                accelerator="cpu" if cpu else "gpu",
                devices=self.devices if cpu or self.devices > 1 else [device.index or 0],
                strategy=_strategy(self.strategy),
                precision=self.precision,  # type: ignore[arg-type]
                accumulate_grad_batches=self.accumulate,
                max_steps=self.steps,
                use_distributed_sampler=False,
                reload_dataloaders_every_n_epochs=1,
                num_sanity_val_steps=0,
                callbacks=callbacks,
                logger=False,
                enable_progress_bar=progress.drawn(),
                enable_model_summary=False,
            )
            with _told(), _interruptible(trainer):
                resumed = str(last) if last.exists() else None
                trainer.fit(module, ckpt_path=resumed, weights_only=False)
            if best.best_model_path:
                state = torch.load(best.best_model_path, weights_only=False)["state_dict"]
                module.load_state_dict(state, strict=False)
            shutil.rmtree(kept, ignore_errors=True)
        task.to(device)
        return module.lines


def _checkpoint(folder: Path, name: str, monitor: str | None = None) -> ModelCheckpoint:
    """One file, written anew after every leg, or after those in which `monitor` is least so far."""
    return ModelCheckpoint(
        dirpath=folder,
        filename=name,
        monitor=monitor,
        save_top_k=1,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )


def _strategy(name: str) -> str | DDPStrategy:
    starts = {"fsdp": "popen", "fsdp_fork": "fork"}
    return Sharded(start_method=starts[name]) if name in starts else name  # type: ignore[arg-type]


@contextmanager
def _told() -> Iterator[None]:
    """A user's mistake that another process met is one here."""
    try:
        yield
    except ProcessRaisedException as reason:
        _, found, told = str(reason).rpartition(f"{UserError.__module__}.UserError: ")
        if not found:
            raise
        raise UserError(told.strip()) from reason


@contextmanager
def _interruptible(trainer: L.Trainer) -> Iterator[None]:
    """Ctrl-C stays a KeyboardInterrupt: Lightning exits with 1 and leaves the signal ignored."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        if not trainer.interrupted:
            raise
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from stop


@contextmanager
def _mode(task: Task, recompute: bool) -> Iterator[None]:
    """Training mode, without the cache of keys and values."""
    modes = {module: module.training for module in task.modules()}
    config = task.model.config
    cached = getattr(config, "use_cache", None)
    config.use_cache = False
    task.train()
    if recompute:
        task.model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        if recompute:
            task.model.gradient_checkpointing_disable()
        config.use_cache = cached
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning says what it found of hardware and what could be faster; nobody asked here."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
