"""Training of weights, rounding and ranges block by block or linear by linear."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from qexp.common import ranks
from qexp.common.errors import FieldError, UserError, check_choice, check_finite, check_int
from qexp.common.files import write_rows
from qexp.common.progress import bar
from qexp.grid import Grid
from qexp.methods.block_losses import LOSSES
from qexp.methods.journal import Finished, Journal
from qexp.methods.unit_log import Best, Log, lines
from qexp.methods.units import UNITS, Objective, Unit, Units
from qexp.packed.base import Packed
from qexp.quantizers.fake_quantize import FakeQuantize
from qexp.quantizers.parametrization import attach_weight_quantizer, weight_quantizer
from qexp.quantizers.scale_rules import ScaleRule, check_scale_rule
from qexp.runs.results import BLOCKS
from qexp.step import Record
from qexp.task import Batch, Task
from qexp.training.code_statistics import CodeStatistics
from qexp.training.optimizer import Optimizer, Parameters
from qexp.training.rounding_penalty import RoundingPenalty
from qexp.walk import Block, walk

LINES = 10  # of the log, for a unit that trains for a number of steps


@dataclass(frozen=True)
class BlockPhase:
    """Units trained so that their output is that of the float model (mean square error). What
    trains are the kinds that the optimizer has rates for.

    unit: `block`, or `linear`, which trains on second moments of all its inputs. inputs: of a unit
    in training, those that `quantized` units before it give or those of the `float` model. epochs:
    passes over the data; steps: their number, in place of epochs. sequences: of a step. keep: the
    parameters after the `last` step, or after the step (0 included) with the `best` loss of the
    first chunk, with hard rounding. loss: a key of LOSSES. targets: outputs of the `float` model,
    or of the float block on the `inputs` of training. loss_weight: `fisher` weights errors by
    `output_importance`. trained: `all` float parameters of a unit, or its `norms`. growth: block i
    has 1 + growth · i / blocks times the rates. penalty: of undecided rounding variables.
    """

    weight: Grid
    formula: FakeQuantize
    scale: ScaleRule
    optimizer: Optimizer
    epochs: int | None = 2
    sequences: int = 2
    seed: int = 0
    unit: str = "block"
    inputs: str = "quantized"
    steps: int | None = None
    keep: str = "last"
    loss: str = "squares"
    targets: str = "float"
    loss_weight: str | None = None
    trained: str = "all"
    growth: float | int = 0.0
    penalty: RoundingPenalty | None = None

    def __post_init__(self) -> None:
        check_int(None, self, sequences=1, seed=0)
        check_choice(None, self, unit=UNITS, inputs=("quantized", "float"), keep=("last", "best"))
        check_choice(None, self, loss=LOSSES, targets=("float", "inputs"), trained=("all", "norms"))
        check_finite(None, self, "growth")
        for key, least in (("epochs", 1), ("steps", 0)):
            if getattr(self, key) is not None:
                check_int(None, self, **{key: least})
        if (self.epochs is None) == (self.steps is None):
            raise FieldError(
                f"steps={self.steps}: with epochs={self.epochs} training has no one length; give "
                "one of the two, and null for the other."
            )
        if self.loss_weight is not None:
            check_choice(None, self, loss_weight=("fisher",))
            if self.loss != "squares":
                raise FieldError(
                    f"loss_weight=fisher: loss={self.loss} has no squares to weigh; give "
                    "loss_weight=null, or loss=squares."
                )
        self._check_unit()
        check_scale_rule(self.scale, self.weight)
        if self.scale.moves_codes:
            raise FieldError(
                "scale: moving codes train with the whole model; give a rule that trains weights "
                "or scales, for example method/scale@method.blocks.scale=lsq."
            )
        if self.penalty is not None and not self.scale.has_rounding_variable:
            raise FieldError(
                f"penalty: {type(self.scale).__name__} has no rounding variables; give null, or "
                "method/scale@method.blocks.scale=adaround."
            )

    def _check_unit(self) -> None:
        """FieldError for settings that need whole blocks."""
        plain = {"loss": "squares", "targets": "float", "loss_weight": None, "trained": "all"}
        for key, value in plain.items():
            if self.unit != "block" and (given := getattr(self, key)) != value:
                raise FieldError(
                    f"{key}={given}: unit={self.unit} trains on moments of its inputs; give "
                    f"unit=block, or {key}={'null' if value is None else value}."
                )

    def __call__(
        self,
        task: Task,
        batches: Sequence[Batch],
        journal: Journal,
        starts: Mapping[str, Packed] = MappingProxyType({}),
    ) -> list[Record]:
        """Blocks that the journal holds are restored from it. The weights that `starts` names keep
        the codes they have there."""
        records: list[Record] = []
        log_rows: Log = []
        objective = Objective(self.loss, self.targets, self.loss_weight == "fisher")
        units = UNITS[self.unit](self.inputs == "float", objective)
        units.starts = starts
        for block in walk(task, batches, self.sequences):
            units.observe(block)
            if (finished := journal.read(block.index)) is None:
                finished = self._finish(block, units)
                journal.write(block.index, *finished)
            else:
                finished.restore(task)
            records += finished.records
            log_rows += [{"block": block.index, **line} for line in finished.log]
            if (folder := task.workspace.folder) is not None and not ranks.rank():
                write_rows(folder / BLOCKS, log_rows)
        return records

    def _finish(self, block: Block, units: Units) -> Finished:
        records: list[Record] = []
        log: Log = []

        def train(unit: Unit) -> None:
            start = time.perf_counter()
            growth = 1 + self.growth * block.index / len(block.task.blocks)
            own = {name: units.starts.get(f"{block.name}.{name}") for name in unit.linears}
            log.extend(self._train(unit, self.seed + block.index, growth, own))
            records.extend(unit.records(self.weight, time.perf_counter() - start))

        units(block, train)
        rounded = {f"{name}.weight" for name in block.linears}
        others = {
            f"{block.name}.{name}": parameter.detach()
            for name, parameter in block.module.named_parameters()
            if name not in rounded
        }
        return Finished(records, others, log)

    def _train(
        self,
        unit: Unit,
        seed: int,
        growth: float = 1.0,
        starts: Mapping[str, Packed | None] = MappingProxyType({}),
    ) -> Log:
        """Train one unit; the lines of its log."""
        for name, linear in unit.linears.items():
            stored = starts.get(name)
            rule = self.scale if stored is None else self.scale.known(stored)
            attach_weight_quantizer(linear, rule, self.weight, self.formula)
        unit.begin()
        unit.set_training(True)  # the walk is in evaluation mode, where clamping is hard
        steps = (self.epochs or 0) * unit.pieces if self.steps is None else self.steps
        every = unit.pieces if self.steps is None else max(steps // LINES, 1)
        parameters = self._parameters(unit)
        optimizer = self.optimizer.optimizer(parameters)
        rates = [group["lr"] for group in optimizer.param_groups]
        generator = torch.Generator().manual_seed(seed)
        order: list[int] = []
        log: Log = []
        losses: list[Tensor] = []
        statistics = CodeStatistics(unit.linears)
        statistics()
        penalty = self._penalty_of(unit, parameters)
        best = Best(unit, parameters)
        best.look(self.keep)
        for step in bar(range(steps), unit.name):
            order = order or torch.randperm(unit.pieces, generator=generator).tolist()
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = growth * rate * self.optimizer.factor(step, steps)
            unit.before_step(step, steps)
            with torch.enable_grad():
                loss = unit.loss(order.pop())
                if not loss.isfinite():
                    raise UserError(
                        f"{unit.name}: step {step} of its training: the loss is not finite; lower "
                        "method.blocks.optimizer's rates."
                    )
                optimizer.zero_grad()
                (loss + penalty(step, steps)).backward()
            limit = math.inf if self.optimizer.clip is None else self.optimizer.clip
            torch.nn.utils.clip_grad_norm_([p for g in parameters.values() for p in g], limit)
            optimizer.step()
            losses.append(loss.detach())
            best.look(self.keep)
            if (step + 1) % every == 0 or step + 1 == steps:
                at = {"epoch" if self.steps is None else "step": (step + 1)}
                if self.steps is None:
                    at["epoch"] //= every
                log += lines(at, unit, torch.stack(losses), statistics)
                losses.clear()
        best.restore()
        unit.set_training(False)
        for parameter in unit.module.parameters():
            parameter.grad = None
        return log

    def _penalty_of(self, unit: Unit, parameters: Parameters) -> Callable[[int, int], Tensor | int]:
        """The penalty at a step (of `steps`), for errors that are averaged over channels."""
        penalty, rounding = self.penalty, parameters.get("rounding", ())
        if penalty is None:
            return lambda step, steps: 0
        of_loss = penalty.relative
        factor = unit.hard_loss() / sum(map(Tensor.numel, rounding)) if of_loss else 1 / unit.width
        return lambda step, steps: factor * penalty(rounding, step, steps)

    def _parameters(self, unit: Unit) -> dict[str, list[nn.Parameter]]:
        """What trains, by kind; nothing else of the unit asks for gradients."""
        fakes = [weight_quantizer(linear) for linear in unit.linears.values()]
        own = {id(p) for made in fakes for p in made.parameters()}
        named = [
            (made.kinds[name], p)
            for made in fakes
            for name, p in made.named_parameters()
            if p.requires_grad
        ]
        named += [("weights", p) for p in unit.floats(self.trained) if id(p) not in own]
        chosen: dict[str, list[nn.Parameter]] = {}
        unit.module.requires_grad_(False)
        for kind, parameter in named:
            parameter.requires_grad_(kind in self.optimizer.kinds)
            if parameter.requires_grad:
                chosen.setdefault(kind, []).append(parameter)
        if not chosen:
            raise UserError(
                f"method.blocks.optimizer: {type(self.optimizer).__name__} has a rate for nothing "
                f"that {type(self.scale).__name__} (method.blocks.scale) can train; choose "
                "another of the two."
            )
        return chosen
