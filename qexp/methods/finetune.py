"""Training with the rounding in place: quantization-aware methods are choices of its parts."""

import copy
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType

import torch
from torch import nn
from transformers import PreTrainedModel

from qexp.common import hashes
from qexp.common.cache import checksum
from qexp.common.errors import FieldError, UserError, check_choice, check_int
from qexp.data.recipe import Recipe
from qexp.gradients import ClampGradient, RoundingGradient
from qexp.grid import Grid
from qexp.methods.checks import finite
from qexp.packed.coded import Coded
from qexp.quantizers.activation import FakeQuant
from qexp.quantizers.fake_quantize import FakeQuantize
from qexp.quantizers.parametrization import (
    attach_weight_quantizer,
    bake,
    float_weight,
)
from qexp.quantizers.scale_rules import KnownCodes, ScaleRule, check_scale_rule
from qexp.quantizers.scheme import Activations, quantize_activations
from qexp.solvers.base import error
from qexp.step import Record, Step
from qexp.task import Batch, Batches, Task
from qexp.training.code_statistics import CodeStatistics
from qexp.training.losses import Objective, Penalty
from qexp.training.module import TrainingSetup
from qexp.training.optimizer import Optimizer
from qexp.training.penalized import PenalizedLoss, Probe
from qexp.training.quantizer_schedule import QuantizerSchedule
from qexp.training.trainable import TrainableParameters
from qexp.training.trainer import Trainer


def _source(task: Task) -> PreTrainedModel:
    if task.original is None:
        raise UserError("method.teacher=source: this task was not loaded by a run; give start.")
    return task.original()


TEACHERS: dict[str, Callable[[Task], PreTrainedModel]] = {
    "start": lambda task: copy.deepcopy(task.model),  # as training finds it, transformed
    "source": _source,  # as it was loaded, before transforms and any quantization
}


@dataclass(frozen=True)
class FineTune(Step):
    """Fake-quantize weights and activations, train, keep the codes.

    weight: null trains a model whose weights stay float. rounding, clamp: what is differentiated;
    activation_rounding: in place of `rounding` for activations, where it is not null. schedule: of
    the quantizers. scale: where the scales of weights come from. trained: what moves. teacher: the
    model that the loss compares with, a key of TEACHERS. train, validation: data, null for the
    calibration batches and for none. Static ranges of activations are fitted to the float model
    first.
    """

    weight: Grid | None
    rounding: RoundingGradient
    clamp: ClampGradient
    scale: ScaleRule
    trained: TrainableParameters
    loss: Objective
    optimizer: Optimizer
    trainer: Trainer
    penalty: Penalty | None = None
    activation_rounding: RoundingGradient | None = None
    schedule: QuantizerSchedule = QuantizerSchedule()  # noqa: RUF009 (frozen: sharing it is safe)
    teacher: str = "start"
    train: Recipe | None = None
    validation: Recipe | None = None
    seed: int = 0
    activations: tuple[Activations, ...] | list[Activations] = ()

    def __post_init__(self) -> None:
        check_int(None, self, seed=0)
        check_choice(None, self, teacher=TEACHERS)
        if self.teacher != "start" and not self.loss.teacher:
            raise FieldError(
                f"teacher={self.teacher}: {type(self.loss).__name__} compares with no model; give "
                "start, or a loss that does (method/loss=logit_kl)."
            )
        if self.trainer.patience is not None and self.validation is None:
            raise FieldError(
                f"validation=null: trainer.patience={self.trainer.patience} waits for a better "
                "validation; give data for it (+calibration@method.validation=first), or null."
            )
        self.schedule.check(self.scale, self.trainer)
        if self.weight is not None:
            check_scale_rule(self.scale, self.weight)
        if self.scale.moves_codes and self.trainer.strategy == "fsdp":
            raise FieldError(
                "scale: codes move in whole matrices, of which trainer.strategy=fsdp gives a "
                "process a part; give trainer.strategy=ddp."
            )

    def __call__(self, task: Task, batches: Batches) -> list[Record]:
        return self.tune(task, batches, {})

    def recipes(self) -> Mapping[str, Recipe]:
        named = {"train": self.train, "validation": self.validation}
        return {name: recipe for name, recipe in named.items() if recipe is not None}

    def tune(self, task: Task, batches: Batches, starts: Mapping[str, Coded]) -> list[Record]:
        """Train; the weights that `starts` names keep the codes they have there."""
        once = cache(batches)
        self.check(task)
        data = once() if self.train is None else self.train(task)
        if not data:
            raise UserError("method.train: training needs data; choose a calibration recipe.")
        identity = f"{origin_of(task, data)} {self!r} {hashes.code()}"
        teacher = None
        if self.loss.teacher:
            teacher = TEACHERS[self.teacher](task).eval().requires_grad_(False)
        quantize_activations(task, self.activations, once)
        linears = task.linears() if self.weight is not None else {}
        start = time.perf_counter()
        with _restored(task), ExitStack() as stack:
            self.install(task, linears, starts)
            schedule = self.schedule.begin(task, list(linears.values()))
            watch = None if self.penalty is None else stack.enter_context(self.penalty.watch(task))

            loss = PenalizedLoss(self.loss, task, teacher, watch)
            few = {key: value[: self.trainer.sequences] for key, value in data[0].items()}
            probe = Probe(task, loss.plain, few)
            statistics = CodeStatistics(linears, dict(task.quantizers.items()), probe)
            setup = TrainingSetup(
                task,
                loss,
                self.trained.parameters(task),
                data,
                self.optimizer,
                () if self.validation is None else self.validation(task),
                loss.plain,
                statistics,
                seed=self.seed,
                identity=hashlib.sha256(identity.encode()).hexdigest()[:8],
                folder=task.workspace.folder,
                notes=[
                    statistics.notes,
                    *([] if watch is None else [watch.notes]),
                    *schedule.notes,
                ],
                reaches_all=self.loss.reaches_all,
                before_step=schedule.before_step,
                after_step=schedule.after_step,
            )
            self.trainer.fit(setup)
            for quantizer in task.quantizers.values():
                assert isinstance(quantizer, FakeQuant)
                quantizer.make_constant()
            seconds = (time.perf_counter() - start) / max(len(linears), 1)
            if self.weight is None:
                return []
            return [record(n, linear, self.weight, seconds) for n, linear in linears.items()]

    def install(
        self,
        task: Task,
        linears: Mapping[str, nn.Linear],
        starts: Mapping[str, Coded] = MappingProxyType({}),
    ) -> None:
        """Round these weights, and whatever activation quantizers there are, so that they train."""
        fake_quantize = FakeQuantize(self.rounding, self.clamp)
        own = replace(fake_quantize, rounding=self.activation_rounding or self.rounding)
        self.trained.prepare(linears.values())
        for name, linear in linears.items():
            assert self.weight is not None
            rule = KnownCodes(starts[name]) if name in starts else self.scale
            attach_weight_quantizer(linear, rule, self.weight, fake_quantize)
        for quantizer in task.quantizers.values():
            assert isinstance(quantizer, FakeQuant)
            quantizer.make_trainable(own, self.trained.offsets)

    def check(self, task: Task) -> None:
        """UserError, before any work, for what cannot be trained."""
        self.loss.check(task)
        check_trainable(task, self.weight)


def check_trainable(task: Task, grid: Grid | None) -> None:
    """UserError, before any work, for a model that cannot be trained, or not with this grid."""
    if next(task.blocks.parameters()).device != task.device:
        raise UserError(
            "offload: training needs the whole model on its device; give offload=false "
            "(trainer.recompute=true saves memory)."
        )
    for name, parameter in task.model.named_parameters():
        if parameter.dtype != torch.float32:
            raise UserError(
                f"model.dtype: {name} is {parameter.dtype}, too coarse to train; load the "
                "model in float32 and let trainer.precision=bf16-mixed save time."
            )
        if not parameter.isfinite().all():
            raise UserError(f"{name} holds values that are not finite; load another model.")
    if grid is None:
        return
    for name, linear in task.linears().items():
        try:
            grid.check(linear.out_features, linear.in_features)
        except UserError as reason:
            raise UserError(f"{name}: {reason}") from reason


def origin_of(task: Task, batches: Sequence[Batch]) -> str:
    """What a result depends on, method aside: checksums of the model's weights, its online maps and
    the data."""
    states = [dict(module.state_dict()) for module in (task.model, task.maps)]
    return f"{task.maps!r} " + "".join(map(checksum, [*states, *batches]))


@torch.no_grad()
def record(name: str, linear: nn.Linear, grid: Grid, seconds: float) -> Record:
    """Bake a trained weight. Errors are shares of that weight, what rounding to nearest would leave
    and what its trained scales leave: what training started from is no measure any more."""
    weight = float_weight(linear).float()
    packed = bake(linear)
    finite(name, linear)
    scale = max(error(weight, None), torch.finfo(torch.float32).tiny)
    before = error(grid(weight) - weight, None) / scale
    after = error(packed.dequantize() - weight, None) / scale
    rows, columns = packed.shape
    return Record(name, rows, columns, packed.bits(), before, after, 0.0, seconds, packed)


@contextmanager
def _restored(task: Task) -> Iterator[None]:
    """Which parameters ask for gradients is afterwards as it was."""
    flags = {name: parameter.requires_grad for name, parameter in task.named_parameters()}
    try:
        yield
    finally:
        for name, parameter in task.named_parameters():
            parameter.requires_grad_(flags.get(name, False))
            parameter.grad = None
