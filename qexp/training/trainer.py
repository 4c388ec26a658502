"""One trainer for every method that trains."""

import logging
import signal
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.strategies import DDPStrategy

from qexp.common import progress, ranks
from qexp.common.errors import UserError, check_choice, check_int
from qexp.common.workspace import CHECKPOINTS
from qexp.task import Task
from qexp.training import launch
from qexp.training.checkpoint import BEST, LAST, Checkpoint, find_checkpoints
from qexp.training.fsdp import FullySharded
from qexp.training.module import Schedule, TrainingModule, TrainingSetup

log = logging.getLogger(__name__)
STRATEGIES = ("auto", "ddp", "fsdp")
PRECISIONS = ("32-true", "bf16-mixed")


@dataclass(frozen=True)
class Trainer:
    """How long and on what: steps of the optimizer, of `accumulate` times `sequences` sequences in
    each of `devices` processes.

    every: steps between validations (and checkpoints, lines of the log). patience: stop after so
    many validations without a better one; null trains to the end. The best weights are kept where
    there is validation data. precision: of forward and backward, `32-true` or `bf16-mixed`.
    recompute: activations of a block are computed again in backward. strategy: of several devices,
    `ddp` (each with the whole model; `auto` too) or `fsdp` (`Sharded`). devices: how many of a
    machine, each with a process and batches of its own.
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
        check_int("trainer", self, steps=1, sequences=1, accumulate=1, every=1, devices=1)
        if self.patience is not None:
            check_int("trainer", self, patience=1)
        check_choice("trainer", self, precision=PRECISIONS, strategy=STRATEGIES)

    def fit(self, setup: TrainingSetup) -> list[dict[str, float]]:
        """Train; the log's lines. Leaves the best (else the last) weights in the model, in the
        modes and on the device that it had. Raises ranks.Done in a process that is not the first.

        Checkpoints stay in the course's folder until the run has written its results
        (`Workspace.clear`): one that is killed before goes on from them."""
        if not any(setup.parameters.values()):
            raise UserError("method.trained: nothing is left to train; choose another set.")
        task, device = setup.task, setup.task.device
        with ExitStack() as stack:
            scratch = stack.enter_context(tempfile.TemporaryDirectory())
            folder = Path(scratch) if setup.folder is None else setup.folder
            stack.enter_context(_quiet())
            stack.enter_context(_mode(task, self.recompute))
            kept = folder / f"{CHECKPOINTS}{setup.identity}"
            schedule = Schedule(self.steps, self.every, self.accumulate, self.sequences)
            module = TrainingModule(setup, schedule, folder)
            left = find_checkpoints(kept)
            if left is not None:
                log.info("training goes on from %s", kept / LAST)
            if left is None or not left.last["course"]["ended"]:
                self._check(device)
                stack.enter_context(launch.processes(setup.folder, self.devices))
                self._fit(module, kept, None if left is None else kept / LAST)
                if ranks.rank():
                    raise ranks.Done
                left = find_checkpoints(kept)
            assert left is not None
            module.lines = left.last["course"]["lines"]
            # what does not train is as it was
            module.load_state_dict((left.best or left.last)["state_dict"], strict=False)
        task.to(device)
        return module.lines

    def _check(self, device: torch.device) -> None:
        """UserError for devices that are not there, or not the ones that several processes take."""
        if device.type == "cpu" or self.devices == 1:
            return
        if self.devices > (there := torch.accelerator.device_count()):
            raise UserError(
                f"trainer.devices={self.devices}: this machine has {there}; give fewer."
            )
        if device.index not in (None, ranks.local_rank()):
            raise UserError(
                f"device={device}: {self.devices} processes take the first {self.devices} devices, "
                "one each; give device=auto."
            )

    def _fit(self, module: TrainingModule, kept: Path, resumed: Path | None) -> None:
        """Train, from a checkpoint if there is one, and leave others in `kept`."""
        setup, device = module.training_setup, module.task.device
        # Not `save_last`, which Lightning writes only where it also saves by the monitor.
        # It comes second, so that it knows what `best` made of the same leg.
        callbacks: list[Callback] = []
        if setup.validation:
            callbacks.append(Checkpoint(kept / BEST, monitor="validation"))
        callbacks.append(Checkpoint(kept / LAST))
        if self.patience is not None:
            callbacks.append(
                EarlyStopping(
                    "validation",
                    patience=self.patience,
                    strict=False,  # a resumed run ends its leg once more, without the metric
                    check_on_train_epoch_end=True,
                )
            )
        cpu = device.type == "cpu"
        trainer = L.Trainer(
            accelerator="cpu" if cpu else "gpu",
            devices=self.devices if cpu or self.devices > 1 else [device.index or 0],
            num_nodes=ranks.nodes(),
            strategy=self._strategy(setup),
            plugins=launch.cluster(),
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
        with _interruptible(trainer):
            trainer.fit(module, ckpt_path=resumed, weights_only=False)

    def _strategy(self, setup: TrainingSetup) -> str | DDPStrategy:
        if self.strategy == "fsdp":
            return FullySharded()
        if self.strategy == "auto" and self.devices == 1:
            return "auto"
        return DDPStrategy(find_unused_parameters=not setup.reaches_all)


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
            if getattr(task.model, "_require_grads_hook", None) is not None:  # put by enabling
                task.model.disable_input_require_grads()
        config.use_cache = cached
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning says what it found of hardware and what could be faster, transformers which name
    `recompute` will have there; nobody asked here."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\..*")
            yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
