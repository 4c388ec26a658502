"""Lightning trainer of all methods that train: steps, devices, precision and resuming."""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.strategies import DDPStrategy, Strategy

from qexp.common import collectives, launch, trainers
from qexp.common.errors import UserError, check_choice, check_int
from qexp.common.numerics import warn_of_slow_bfloat16
from qexp.common.workspace import CHECKPOINTS
from qexp.task import Task
from qexp.training.checkpoint import BEST, LAST, Checkpoint, find_checkpoints
from qexp.training.fsdp import FullySharded
from qexp.training.module import Schedule, TrainingModule, TrainingSetup

log = logging.getLogger(__name__)
STRATEGIES = ("auto", "ddp", "fsdp")


@dataclass(frozen=True)
class Trainer:
    """Length, batch size, precision and devices of training.

    steps: of the optimizer, each with `accumulate` times `sequences` sequences in each of `devices`
    processes. every: steps per interval; each ends with validation, a checkpoint and a line of the
    log. patience: stop after this many validations without improvement; null trains all steps. With
    validation data the best weights are used, otherwise the last. precision: of forward and
    backward, `32-true` or `bf16-mixed`. recompute: recompute activations of a block in backward.
    devices: number per machine, each with its own process and batches; the root key `trainer` sets
    those of the whole run. strategy: `ddp` (each device holds the model; `auto` with several
    devices) or `fsdp` (`FullySharded`).
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
        check_choice("trainer", self, precision=tuple(trainers.PRECISIONS), strategy=STRATEGIES)

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
            stack.enter_context(_mode(task, self.recompute))
            checkpoints = folder / f"{CHECKPOINTS}{setup.identity}"
            schedule = Schedule(self.steps, self.every, self.accumulate, self.sequences)
            module = TrainingModule(setup, schedule, folder)
            course = collectives.from_first(lambda: _course(checkpoints))
            if course is not None:
                log.info("training resumes from %s", checkpoints / LAST)
            if course is None or not course["ended"]:
                trainers.check(device, self.devices)
                stack.enter_context(launch.processes(None, self.devices))
                self._fit(module, checkpoints, None if course is None else checkpoints / LAST)
            else:
                for line in course["lines"]:
                    module.log_line(task.workspace.loggers, line)
            task.to(device)
            module.lines = collectives.from_first(lambda: _trained(module, checkpoints))
            collectives.synchronize(module)
        return module.lines

    def _fit(self, module: TrainingModule, folder: Path, resumed: Path | None) -> None:
        """Trains, from checkpoint `resumed` if there is one, and writes checkpoints to `folder`."""
        setup, device = module.training_setup, module.task.device
        if self.precision == "bf16-mixed":
            warn_of_slow_bfloat16("trainer.precision=bf16-mixed", device.type)
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
        with trainers.trainer(
            device,
            self.devices,
            strategy=self._strategy(setup),
            precision=self.precision,
            accumulate_grad_batches=self.accumulate,
            max_steps=self.steps,
            reload_dataloaders_every_n_epochs=1,
            num_sanity_val_steps=0,
            callbacks=callbacks,
            logger=list(setup.task.workspace.loggers) or False,
        ) as trainer:
            trainer.fit(module, ckpt_path=resumed, weights_only=False)

    def _strategy(self, setup: TrainingSetup) -> Strategy | str:
        if self.strategy == "fsdp":
            return FullySharded()
        if self.strategy == "auto" and collectives.is_single_process():
            return "auto"
        return DDPStrategy(find_unused_parameters=not setup.reaches_all)


def _course(folder: Path) -> dict[str, Any] | None:
    """How far the checkpoints of a folder are, and the lines of their log; None without any."""
    found = find_checkpoints(folder)
    return found and {key: found.last["course"][key] for key in ("ended", "lines")}


def _trained(module: TrainingModule, folder: Path) -> list[dict[str, float]]:
    """Load the best weights, or the last without validation, and return the lines of the log."""
    found = find_checkpoints(folder)
    assert found is not None
    course = found.last["course"]
    module.lines, module.tensors = course["lines"], course["tensors"]
    module.write_log()  # of a training that an earlier attempt finished, too
    # not strict: checkpoints contain only the trainable parameters
    module.load_state_dict((found.best or found.last)["state_dict"], strict=False)
    return module.lines


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
