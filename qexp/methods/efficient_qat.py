"""EfficientQAT (2407.11062): training block by block, then end-to-end training of the scales."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qexp.common.errors import UserError, check_int
from qexp.common.files import write_rows
from qexp.common.progress import bar
from qexp.data.recipe import Recipe
from qexp.grid import Grid
from qexp.methods.finetune import FineTune, origin_of, record
from qexp.methods.journal import Finished, Journal
from qexp.packed.coded import Coded
from qexp.quantizers.fake_quantize import FakeQuantize
from qexp.quantizers.parametrization import attach_weight_quantizer, weight_quantizer
from qexp.quantizers.scale_rules import ScaleRule, check_scale_rule
from qexp.quantizers.scheme import Activations
from qexp.runs.results import BLOCKS
from qexp.step import Record, Step
from qexp.task import Batch, Batches, Task
from qexp.training.code_statistics import CodeStatistics
from qexp.training.optimizer import AdamW
from qexp.walk import Block, walk


@dataclass(frozen=True)
class BlockPhase:
    """Block-AP: weights, scales and zero points of a block trained so that, on what the quantized
    blocks before it give, it makes what the float block makes of what float blocks give (mean
    square error). sequences: of a step. epochs: passes over the data.
    """

    weight: Grid
    formula: FakeQuantize
    scale: ScaleRule
    optimizer: AdamW
    epochs: int = 2
    sequences: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        check_int(None, self, epochs=1, sequences=1, seed=0)
        check_scale_rule(self.scale, self.weight)

    def __call__(self, task: Task, batches: Sequence[Batch], journal: Journal) -> list[Record]:
        """Blocks that the journal holds are restored from it."""
        records: list[Record] = []
        log_rows: list[dict[str, float | int | str]] = []
        exact: list[Tensor] = []
        for block in walk(task, batches, self.sequences):
            with torch.no_grad():
                exact = [block.replay(n, hidden) for n, hidden in enumerate(exact or block.inputs)]
            if (finished := journal.read(block.index)) is None:
                finished = self._finish(block, exact)
                journal.write(block.index, *finished)
            else:
                finished.restore(task)
            records += finished.records
            log_rows += [{"block": block.index, **line} for line in finished.log]
            if task.workspace.folder is not None:
                write_rows(task.workspace.folder / BLOCKS, log_rows)
        return records

    def _finish(self, block: Block, exact: Sequence[Tensor]) -> Finished:
        start = time.perf_counter()
        log = self._train(block, exact)
        seconds = (time.perf_counter() - start) / len(block.linears)
        records = [
            record(f"{block.name}.{name}", linear, self.weight, seconds)
            for name, linear in block.linears.items()
        ]
        rounded = {f"{name}.weight" for name in block.linears}
        others = {
            f"{block.name}.{name}": parameter.detach()
            for name, parameter in block.module.named_parameters()
            if name not in rounded
        }
        return Finished(records, others, log)

    def _train(self, block: Block, targets: Sequence[Tensor]) -> list[dict[str, float | int | str]]:
        """Train one block; the lines of its log, per epoch."""
        for linear in block.linears.values():
            attach_weight_quantizer(linear, self.scale, self.weight, self.formula)
            weight_quantizer(
                linear
            ).train()  # the walk is in evaluation mode, where clamping is hard
        steps = self.epochs * len(targets)
        parameters = self._parameters(block)
        optimizer = self.optimizer.optimizer(parameters)
        rates = [group["lr"] for group in optimizer.param_groups]
        generator = torch.Generator().manual_seed(self.seed + block.index)
        order: list[int] = []
        log: list[dict[str, float | int | str]] = []
        losses: list[Tensor] = []
        statistics = CodeStatistics(block.linears)
        statistics()
        for step in bar(range(steps), block.name):
            order = order or torch.randperm(len(targets), generator=generator).tolist()
            chunk = order.pop()
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * self.optimizer.factor(step, steps)
            with torch.enable_grad():
                output = block.replay(chunk, block.inputs[chunk].detach())
                loss = (output.float() - targets[chunk].float()).square().mean()
                if not loss.isfinite():
                    raise UserError(
                        f"{block.name}: step {step} of its training: the loss is not finite; lower "
                        "method.blocks.optimizer's rates."
                    )
                optimizer.zero_grad()
                loss.backward()
            limit = math.inf if self.optimizer.clip is None else self.optimizer.clip
            torch.nn.utils.clip_grad_norm_([p for g in parameters.values() for p in g], limit)
            optimizer.step()
            losses.append(loss.detach())
            if not order:
                mean = float(torch.stack(losses).mean())
                epoch, moved = (step + 1) // len(targets), statistics()
                log.append({"epoch": epoch, "name": "", "loss": mean, **moved.whole})
                for name, numbers in moved.tensors.items():
                    log.append({"epoch": epoch, "name": name, **numbers})
                losses.clear()
        for linear in block.linears.values():
            weight_quantizer(linear).eval()
        for parameter in block.module.parameters():
            parameter.grad = None
        return log

    def _parameters(self, block: Block) -> Mapping[str, list[torch.nn.Parameter]]:
        fakes = [weight_quantizer(linear) for linear in block.linears.values()]
        moves = {p: p.requires_grad for made in fakes for p in made.parameters()}
        own = {id(p) for p in moves}
        named = [(name, p) for made in fakes for name, p in made.named_parameters() if moves[p]]
        chosen = {
            "scales": [p for name, p in named if name == "scale"],
            "offsets": [p for name, p in named if name == "zero"],
            "weights": [p for p in block.module.parameters() if id(p) not in own],
        }
        for parameter in chosen["weights"]:
            parameter.requires_grad_(True)
        return chosen


@dataclass(frozen=True)
class EfficientQAT(Step):
    """The block phase, then `end` with fixed codes. A killed run resumes at its block, or at the
    training interval of `end`."""

    blocks: BlockPhase
    end: FineTune

    @property
    def activations(self) -> Sequence[Activations]:
        return self.end.activations

    def recipes(self) -> Mapping[str, Recipe]:
        return self.end.recipes()

    def __call__(self, task: Task, batches: Batches) -> list[Record]:
        self.end.check(task)
        data = batches() if self.end.train is None else self.end.train(task)
        journal = Journal(
            {
                "model": origin_of(task, data),
                "method": repr(self.blocks),
                "device": task.device.type,
            }
        )
        flags = {name: parameter.requires_grad for name, parameter in task.named_parameters()}
        records = self.blocks(task, data, journal)
        for name, parameter in task.named_parameters():
            parameter.requires_grad_(flags[name])
        starts = {made.name: made.packed for made in records if isinstance(made.packed, Coded)}
        made = self.end.tune(task, lambda: data, starts)
        task.workspace.remove_when_done(partial(journal.clear, len(task.blocks)))
        return made
