"""Training with the rounding in place: quantization-aware methods are choices of its parts."""

import copy
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType

from torch import nn
from transformers import PreTrainedModel

from qexp.common import hashes, numerics
from qexp.common.cache import checksum
from qexp.common.errors import FieldError, UserError, check_choice, check_int
from qexp.data.recipe import Recipe
from qexp.gradients import ClampGradient, RoundingGradient
from qexp.grid import Grid
from qexp.methods.checks import check_trainable
from qexp.methods.write_back import record
from qexp.packed.base import Packed
from qexp.packed.low_rank import LowRank
from qexp.quantizers.activation import FakeQuant
from qexp.quantizers.adapter import Adapter, NoAdapter
from qexp.quantizers.fake_quantize import FakeQuantize
from qexp.quantizers.parametrization import (
    attach_update,
    attach_weight_quantizer,
    merge,
)
from qexp.quantizers.scale_rules import Constant, ScaleRule, check_scale_rule
from qexp.quantizers.scheme import Activations, quantize_activations
from qexp.step import Record, Step
from qexp.task import Batches, Task
from qexp.training.checkpoint import origin_of
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

    weight: null trains a model whose weights stay float, and merges low-rank updates into them.
    rounding, clamp: what is differentiated; activation_rounding: in place of `rounding` for
    activations, where it is not null. schedule: of the quantizers. scale: where the scales of
    weights come from. trained: what moves. adapter: a low-rank residual of every linear that stays
    in storage. teacher: the model that the loss compares with, a key of TEACHERS. train,
    validation: data, null for the calibration batches and for none. Static ranges of activations
    are fitted to the float model first.
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
    adapter: Adapter | NoAdapter = NoAdapter()  # noqa: RUF009 (frozen)
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
        if isinstance(self.adapter, Adapter) and self.weight is None:
            raise FieldError(
                "adapter: a float weight takes a low-rank update in; give method/adapter=none with "
                "method/trained=low_rank, or a grid."
            )
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

    def tune(self, task: Task, batches: Batches, starts: Mapping[str, Packed]) -> list[Record]:
        """Train; the weights that `starts` names keep the codes they have there, and adapters start
        with the factors they have there."""
        once = cache(batches)
        self.check(task)
        data = once() if self.train is None else self.train(task)
        if not data:
            raise UserError("method.train: training needs data; choose a calibration recipe.")
        stored = "".join(checksum(start.stored()) for start in starts.values())
        identity = f"{origin_of(task, data)} {stored} {self!r} {hashes.code()} "
        identity += str(numerics.identity(task.device))
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

            loss = PenalizedLoss(self.loss.fitted(teacher, data), task, teacher, watch)
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
                for linear in task.linears().values() if self.trained.rank else ():
                    merge(linear)
                return []
            return [record(n, linear, self.weight, seconds) for n, linear in linears.items()]

    def install(
        self,
        task: Task,
        linears: Mapping[str, nn.Linear],
        starts: Mapping[str, Packed] = MappingProxyType({}),
    ) -> None:
        """Round these weights, and whatever activation quantizers there are, so that they train."""
        frozen = self.trained.frozen_linears(task)
        fake_quantize = FakeQuantize(self.rounding, self.clamp)
        own = replace(fake_quantize, rounding=self.activation_rounding or self.rounding)
        updated = (linears or task.linears()).items()
        self.trained.prepare(linear for name, linear in updated if name not in frozen)
        for name, linear in linears.items():
            assert self.weight is not None
            rule: ScaleRule = Constant() if name in frozen else self.scale
            start = starts.get(name)
            update = None if name in frozen else self.adapter.of(linear, start)
            if update is not None and isinstance(start, LowRank):
                start = start.base
            if start is not None:
                rule = rule.known(start)
            attach_weight_quantizer(linear, rule, self.weight, fake_quantize)
            if update is not None:
                attach_update(linear, update)
        for quantizer in task.quantizers.values():
            assert isinstance(quantizer, FakeQuant)
            quantizer.make_trainable(own, self.trained.offsets)

    def check(self, task: Task) -> None:
        """UserError, before any work, for what cannot be trained."""
        self.loss.check(task)
        check_trainable(task, self.weight)
        self.trained.frozen_linears(task)
        for linear in task.linears().values():
            self.adapter.check(linear.out_features, linear.in_features)


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
