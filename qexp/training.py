"""One trainer for every method that trains."""

import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from qexp import progress
from qexp.course import Course, Pace, Training
from qexp.errors import UserError
from qexp.task import Task

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trainer:
    """How long and on what: steps of the optimizer, of `accumulate` times `sequences` sequences.

    every: steps between validations (and checkpoints, lines of the log). patience: stop after so
    many validations without a better one; null trains to the end. The best weights are kept where
    there is validation data. precision: of forward and backward, `32-true` or `bf16-mixed`.
    recompute: activations of a block are computed again in backward. strategy, devices: as
    Lightning names them.
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

    def check(self) -> None:
        """UserError for a strategy whose result could not be kept."""
        if self.strategy.startswith("fsdp"):
            raise UserError(
                f"trainer.strategy={self.strategy}: weights that lie in shards over GPUs cannot be "
                "rounded and stored after training yet; give trainer=ddp (on the CPU with "
                "trainer.strategy=ddp_fork), and trainer.recompute=true where memory is short."
            )

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
            best = ModelCheckpoint(
                dirpath=kept,
                filename="best",
                monitor="validation" if course.validation else None,
                save_top_k=1 if course.validation else 0,
                save_last=True,
                save_on_train_epoch_end=True,
                enable_version_counter=False,
            )
            callbacks: list[Callback] = [best]
            if self.patience is not None and course.validation:
                callbacks.append(
                    EarlyStopping(
                        "validation", patience=self.patience, check_on_train_epoch_end=True
                    )
                )
            last = kept / "last.ckpt"
            if last.exists():
                log.info("training goes on from %s", last)
            cpu = device.type == "cpu"
            L.Trainer(
                accelerator="cpu" if cpu else "gpu",
                devices=self.devices if cpu or self.devices > 1 else [device.index or 0],
                strategy=self.strategy,
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
            ).fit(module, ckpt_path=str(last) if last.exists() else None, weights_only=False)
            if best.best_model_path:
                state = torch.load(best.best_model_path, weights_only=False)["state_dict"]
                module.load_state_dict(state, strict=False)
            shutil.rmtree(kept, ignore_errors=True)
        task.to(device)
        return module.lines


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
