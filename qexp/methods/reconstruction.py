"""Reconstruction by units (AdaRound, AdaQuant, BRECQ, AutoRound), then training of the scales in
the whole model where wanted (EfficientQAT)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from qexp.common import numerics
from qexp.common.cache import checksum
from qexp.data.recipe import Recipe
from qexp.methods.block_phase import BlockPhase
from qexp.methods.checks import check_trainable
from qexp.methods.finetune import FineTune
from qexp.methods.journal import Journal
from qexp.packed.base import Packed
from qexp.quantizers.scheme import Activations, quantize_activations
from qexp.step import Record, Step
from qexp.task import Batch, Batches, Task
from qexp.training.checkpoint import origin_of


@dataclass(frozen=True)
class Reconstruction(Step):
    """The block phase, then `end`, if there is one, with fixed codes. A killed run resumes at its
    block, or at the training interval of `end`.

    The weights that an earlier method stored keep its codes in both (`tune`).

    activations: by default those of `end`. activations_first: blocks train with rounded
    activations, whose static ranges are fitted to the float model; otherwise ranges are fitted, and
    activations rounded, after the block phase.
    """

    blocks: BlockPhase
    end: FineTune | None = None
    activations: tuple[Activations, ...] | list[Activations] = ()
    activations_first: bool = False

    def __post_init__(self) -> None:
        if self.end is not None and not self.activations:
            object.__setattr__(self, "activations", self.end.activations)

    def recipes(self) -> Mapping[str, Recipe]:
        return {} if self.end is None else self.end.recipes()

    def __call__(self, task: Task, batches: Batches) -> list[Record]:
        return self.tune(task, batches, {})

    def check(self, task: Task) -> None:
        """UserError, before any work, for what cannot be trained."""
        if self.end is not None:
            self.end.check(task)
        check_trainable(task, self.blocks.weight)

    def tune(self, task: Task, batches: Batches, starts: Mapping[str, Packed]) -> list[Record]:
        """Both phases; the weights that `starts` names keep the codes they have there."""
        self.check(task)
        train = None if self.end is None else self.end.train
        data = batches() if train is None else train(task)
        identity = {
            "model": origin_of(task, data),
            "method": repr(self.blocks),
            **numerics.identity(task.device),
        }
        if starts:
            identity["starts"] = "".join(checksum(start.stored()) for start in starts.values())
        if self.activations_first:
            quantize_activations(task, self.activations, lambda: data)
            identity["activations"] = repr(task.quantizers)
        journal = Journal(identity)
        made = self._train(task, data, journal, starts)
        task.workspace.remove_when_done(partial(journal.clear, len(task.blocks)))
        return made

    def _train(
        self, task: Task, data: Sequence[Batch], journal: Journal, starts: Mapping[str, Packed]
    ) -> list[Record]:
        flags = {name: parameter.requires_grad for name, parameter in task.named_parameters()}
        records = self.blocks(task, data, journal, starts)
        for name, parameter in task.named_parameters():
            parameter.requires_grad_(flags[name])
        left = () if self.activations_first else self.activations
        if self.end is None:
            quantize_activations(task, left, lambda: list(data))
            return records
        codes = {made.name: made.packed.whole() for made in records}
        return replace(self.end, activations=left).tune(task, lambda: list(data), codes)
