"""LightningModule of a training setup.

Training is divided into intervals of `every` optimizer steps (Lightning's epochs). Each ends with
validation, a line of the log and a checkpoint. The sequences of a step depend only on the seed and
the step's number, so a killed run resumes from its last interval and reaches the same weights.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qexp.runs.results import TENSORS, TRAINING
from qexp.task import Batch, Task, trimmed
from qexp.training import divergence
from qexp.training.batches import SeededBatches, random_state, restore_random, stack
from qexp.training.code_statistics import Snapshot
from qexp.training.fsdp import full_tensor, unsharded
from qexp.training.optimizer import AdamW, Optimizer

Loss = Callable[[Batch], Float[Tensor, ""]]


@dataclass
class TrainingSetup:
    """The parameters to train by kind, the loss of a batch, and the data.

    measure: statistics for the log at the end of each interval. identity: digest of everything the
    result depends on; only a run with the same identity resumes from its checkpoint. notes: state
    of the loss and of `measure`, saved in checkpoints. reaches_all: whether the loss depends on
    every parameter. before_step: called before each forward pass with the number of the step and of
    all steps. after_step: called after each step of the optimizer.
    """

    task: Task
    loss: Loss
    parameters: Mapping[str, Sequence[nn.Parameter]]
    batches: Sequence[Batch]
    optimizer: Optimizer = field(default_factory=AdamW)
    validation: Sequence[Batch] = ()
    validation_loss: Loss | None = None
    measure: Callable[[], Snapshot] = Snapshot
    seed: int = 0
    identity: str = ""
    folder: Path | None = None
    notes: Sequence[dict[str, Any]] = ()
    reaches_all: bool = True
    before_step: Callable[[int, int], None] = lambda step, steps: None
    after_step: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Schedule:
    """Optimizer steps in total and per interval, batches per step, sequences per batch."""

    steps: int
    every: int
    accumulate: int
    sequences: int


class TrainingModule(L.LightningModule):
    """Training steps, validation and checkpoints of a training setup."""

    strict_loading = False  # checkpoints contain only the trainable parameters
    forwards = ("training_step", "validation_step", "measure")  # methods that run the model

    def __init__(self, setup: TrainingSetup, schedule: Schedule, folder: Path) -> None:
        super().__init__()
        self.task = setup.task
        self.training_setup, self.schedule, self.folder = setup, schedule, folder
        self.lines: list[dict[str, float]] = []
        self.tensors: list[dict[str, float | str]] = []
        self.losses: list[Tensor] = []
        self.random: list[Tensor] = []
        kinds = {id(p): kind for kind, group in setup.parameters.items() for p in group}
        self.kinds = {name: kinds[id(p)] for name, p in self.named_parameters() if id(p) in kinds}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return {name: full_tensor(p.detach()) for name, p in self._chosen()}

    def _chosen(self, kind: str | None = None) -> Iterator[tuple[str, nn.Parameter]]:
        """The trainable parameters, by name because a strategy may replace parameter objects."""
        for name, parameter in self.named_parameters():
            if name in self.kinds and kind in (None, self.kinds[name]):
                yield name, parameter

    def configure_optimizers(self) -> Any:
        parameters = {
            kind: [p for _, p in self._chosen(kind)] for kind in self.training_setup.parameters
        }
        optimizer = self.training_setup.optimizer.optimizer(parameters)
        optimizer.register_step_post_hook(lambda *_: self.training_setup.after_step())
        rule, steps = self.training_setup.optimizer, self.schedule.steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: rule.factor(at, steps))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def train_dataloader(self) -> DataLoader[Batch]:
        schedule, interval = self.schedule, self.global_step // self.schedule.every
        steps = min(schedule.every, schedule.steps - interval * schedule.every)
        ranks = self.trainer.world_size
        count = schedule.accumulate * ranks
        rows = SeededBatches(
            stack(self.training_setup.batches),
            schedule.sequences,
            self.training_setup.seed,
            interval * schedule.every * count,
            max(steps, 0) * count,
            self.trainer.global_rank,
            ranks,
        )
        return DataLoader(rows, batch_size=None, generator=torch.Generator())

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        """All validation data in every process, so that the loss is that of a single process."""
        if not self.training_setup.validation:
            return []
        data, rows = stack(self.training_setup.validation), self.schedule.sequences
        parts = [
            {key: value[start : start + rows] for key, value in data.items()}
            for start in range(0, len(next(iter(data.values()))), rows)
        ]
        return [DataLoader(parts, batch_size=None, generator=torch.Generator())]  # type: ignore[arg-type]

    def training_step(self, batch: Batch, index: int) -> Float[Tensor, ""]:
        self.training_setup.before_step(self.global_step, self.schedule.steps)
        loss = self.training_setup.loss(trimmed(batch))
        finite = bool(loss.isfinite())
        if self.trainer.strategy.reduce(torch.tensor(float(not finite)).to(loss), reduce_op="sum"):
            raise divergence.same_on_all_ranks(
                divergence.diagnose_loss(self.task, batch, self.global_step), not finite
            )
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch: Batch, index: int) -> None:
        loss = (self.training_setup.validation_loss or self.training_setup.loss)(trimmed(batch))
        if not loss.isfinite():
            raise divergence.diagnose_loss(self.task, batch, self.global_step, "validation loss")
        rows = len(next(iter(batch.values())))
        self.log("validation", loss, batch_size=rows, on_epoch=True, sync_dist=True)

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        chosen = [p for name, p in self._chosen() if self.kinds[name] != "codes"]
        norm = full_tensor(nn.utils.get_total_norm([p.grad for p in chosen if p.grad is not None]))
        limit = self.training_setup.optimizer.clip
        if not norm.isfinite():
            raise divergence.diagnose_gradient(self.task, self.global_step)
        if limit is not None and norm > limit:
            nn.utils.clip_grads_with_norm_(chosen, limit, norm)

    @staticmethod
    def log_line(loggers: Sequence[Any], line: Mapping[str, float]) -> None:
        """Give a line of the log to loggers of Lightning."""
        for logger in loggers:
            named = {f"training/{key}": value for key, value in line.items()}
            logger.log_metrics(named, step=int(line["step"]))

    def measure(self) -> Snapshot:
        with unsharded(self), self.trainer.precision_plugin.forward_context():
            return self.training_setup.measure()

    def on_train_start(self) -> None:
        self.measure()  # the reference for later changes
        for line in self.lines:  # of an earlier attempt
            self.log_line(self.loggers, line)
        if self.random:
            restore_random(self.random, self.device)

    def on_train_epoch_end(self) -> None:
        if not self.losses:  # resumed at the end of an interval: Lightning calls this hook again
            return
        line = {"step": float(self.global_step)}
        loss = torch.stack(self.losses[:: self.training_setup.optimizer.passes]).mean()
        line["loss"] = float(self.trainer.strategy.reduce(loss, reduce_op="mean"))
        self.losses.clear()
        if "validation" in self.trainer.callback_metrics:
            line["validation"] = float(self.trainer.callback_metrics["validation"])
        snapshot = self.measure()
        self.lines.append(line | dict(snapshot.whole))
        self.log_line(self.loggers, self.lines[-1])
        for name, numbers in snapshot.tensors.items():
            self.tensors.append({"step": self.global_step, "name": name, **numbers})
        if self.trainer.is_global_zero:
            self.write_log()

    def write_log(self) -> None:
        for name, rows in ((TRAINING, self.lines), (TENSORS, self.tensors)):
            if rows:
                self.task.workspace.log(self.folder / name, self.training_setup.identity, rows)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        logged = {"lines": self.lines, "tensors": self.tensors, "notes": self.training_setup.notes}
        ended = self.trainer.should_stop or self.global_step >= self.schedule.steps
        checkpoint["course"] = {**logged, "random": random_state(self.device), "ended": ended}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint["course"]
        self.lines, self.tensors, self.random = saved["lines"], saved["tensors"], saved["random"]
        for notes, before in zip(self.training_setup.notes, saved["notes"], strict=True):
            notes.update(before)
