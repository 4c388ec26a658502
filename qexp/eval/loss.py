"""Mean training loss of the model on held-out batches, for encoders and image models."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qexp.common.errors import UserError
from qexp.data.corpus import Corpus
from qexp.data.recipe import Recipe
from qexp.eval.base import Evaluator
from qexp.eval.loop import measured
from qexp.task import Task, in_rows


@dataclass(frozen=True)
class MeanLoss(Evaluator):
    """The mean of task.loss over the rows of `batches`, in nats.

    `batch_rows`: rows per forward pass. The standard error is over these small batches.
    """

    name: str
    batches: Recipe
    batch_rows: int = 4

    def __call__(self, task: Task) -> dict[str, float]:
        batches = in_rows(self.batches(task), self.batch_rows)
        rows = [len(next(iter(batch.values()))) for batch in batches]
        losses = measured(task, self.name, batches, lambda batch: float(task.loss(batch)))
        if not losses:
            raise UserError(f"eval {self.name}: batches: the data has no rows")
        if not all(map(math.isfinite, losses)):
            raise UserError(
                f"eval {self.name}: the loss is not finite: the model's weights or activations "
                "contain NaN or infinity"
            )
        total = sum(rows)
        mean = sum(n * x for n, x in zip(rows, losses, strict=True)) / total
        squares = sum((n * (x - mean)) ** 2 for n, x in zip(rows, losses, strict=True))
        count = len(losses)
        error = math.sqrt(squares * count / (count - 1)) / total if count > 1 else math.nan
        return {"loss": mean, "loss_stderr": error, "rows": float(total)}

    def definition(self) -> dict[str, Any]:
        return {"kind": "MeanLoss", "batches": self.batches.definition()}

    def followed(self, task: Task) -> dict[str, Any]:
        return self.batches.followed(task)

    def files(self) -> list[Path]:
        return self.batches.files()

    def reads(self) -> list[tuple[Corpus, str]]:
        return self.batches.reads()
