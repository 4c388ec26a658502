"""Lightning trainer of all methods that train: steps, devices, precision and resuming."""

import logging
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy

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
PRECISIONS: dict[str, Callable[[str], Precision]] = {  # from the type of the device
    "32-true": lambda _: Precision(),
    "bf16-mixed": lambda kind: MixedPrecision("bf16-mixed", kind),
}


@dataclass(frozen=True)
class Trainer:
    """Length, batch size, precision and devices of training.

    steps: of the optimizer, each with `accumulate` times `sequences` sequences in each of `devices`
    processes. every: steps per interval; each ends with validation, a checkpoint and a line of the
    log. patience: stop after this many validations without improvement; null trains all steps. With
    validation data the best weights are used, otherwise the last. precision: of forward and
    backward, `32-true` or `bf16-mixed`. recompute: recompute activations of a block in backward.
    devices: number per machine, each with its own process and batches. strategy: `ddp` (each device
    holds the model; `auto` with several devices) or `fsdp` (`FullySharded`).
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
        check_choice("trainer", self, precision=tuple(PRECISIONS), strategy=STRATEGIES)

    def fit(self, setup: TrainingSetup) -> list[dict[str, float]]:
        """Trains the model in place and returns the lines of the log.

        Checkpoints stay in the course's folder until the run has written its results
        (`Workspace.clear`): one that is killed before goes on from them."""
        if not any(setup.parameters.values()):
            raise UserError("method.trained: no parameter is trainable; choose another set.")
        if setup.optimizer.passes > 1 and (self.accumulate > 1 or self.strategy == "fsdp"):
            raise UserError(
                "method.optimizer.sam: its two passes are over one batch, of whole parameters; "
                "give trainer.accumulate=1 and a trainer.strategy other than fsdp."
            )
        task, device = setup.task, setup.task.device
        with ExitStack() as stack:
            scratch = stack.enter_context(tempfile.TemporaryDirectory())
            folder = Path(scratch) if setup.folder is None else setup.folder
            stack.enter_context(_quiet())
            stack.enter_context(_mode(task, self.recompute))
            checkpoints = folder / f"{CHECKPOINTS}{setup.identity}"
            schedule = Schedule(self.steps, self.every, self.accumulate, self.sequences)
            module = TrainingModule(setup, schedule, folder)
            found = find_checkpoints(checkpoints)
            if found is not None:
                log.info("training resumes from %s", checkpoints / LAST)
            if found is None or not found.last["course"]["ended"]:
                self._check(device)
                stack.enter_context(launch.processes(setup.folder, self.devices))
                self._fit(module, checkpoints, None if found is None else checkpoints / LAST)
                if ranks.rank():
                    raise ranks.Done
                found = find_checkpoints(checkpoints)
            assert found is not None
            module.lines = found.last["course"]["lines"]
            # not strict: checkpoints contain only the trainable parameters
            module.load_state_dict((found.best or found.last)["state_dict"], strict=False)
        task.to(device)
        return module.lines

    def _check(self, device: torch.device) -> None:
        """Raises UserError if there are too few devices, or another one than processes use."""
        if device.type == "cpu" or self.devices == 1:
            return
        if self.devices > (available := torch.accelerator.device_count()):
            raise UserError(
                f"trainer.devices={self.devices}: this machine has {available}; give fewer."
            )
        if device.index not in (None, ranks.local_rank()):
            raise UserError(
                f"device={device}: trainer.devices={self.devices} uses the first {self.devices} "
                "devices; give device=auto."
            )

    def _fit(self, module: TrainingModule, folder: Path, resumed: Path | None) -> None:
        """Trains, from checkpoint `resumed` if there is one, and writes checkpoints to `folder`."""
        setup, device = module.training_setup, module.task.device
        # Not Lightning's `save_last`, which is written only when the monitored one is too.
        # LAST comes second, so that it contains the state of BEST after the same interval.
        callbacks: list[Callback] = []
        if setup.validation:
            callbacks.append(Checkpoint(folder / BEST, monitor="validation"))
        callbacks.append(Checkpoint(folder / LAST))
        if self.patience is not None:
            callbacks.append(
                EarlyStopping(
                    "validation",
                    patience=self.patience,
                    strict=False,  # a resumed run ends its interval again, without the metric
                    check_on_train_epoch_end=True,
                )
            )
        trainer = L.Trainer(
            accelerator=device.type,
            devices=self.devices,
            num_nodes=ranks.nodes(),
            strategy=self._strategy(setup),
            # Lightning by itself takes every device for CUDA that is not the CPU.
            plugins=[launch.cluster(), PRECISIONS[self.precision](device.type)],
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

    def _strategy(self, setup: TrainingSetup) -> Strategy:
        if self.strategy == "fsdp":
            return FullySharded()
        if self.strategy == "auto" and self.devices * ranks.nodes() == 1:
            return SingleDeviceStrategy(setup.task.device)
        return DDPStrategy(find_unused_parameters=not setup.reaches_all)


@contextmanager
def _interruptible(trainer: L.Trainer) -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt: Lightning exits with 1 and leaves the signal ignored."""
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
    """Training mode without KV cache; the old modes are restored after the context."""
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
            # enabling gradient checkpointing has registered this hook
            if getattr(task.model, "_require_grads_hook", None) is not None:
                task.model.disable_input_require_grads()
        config.use_cache = cached
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences Lightning's hardware hints and a deprecation warning of transformers."""
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
