"""Top-1 accuracy of a classifier."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qexp.common.errors import UserError
from qexp.data.corpus import Corpus
from qexp.data.recipe import Recipe
from qexp.eval.base import Evaluator
from qexp.eval.loop import measured
from qexp.task import Batch, Classifier, Task, in_rows, trimmed


@dataclass(frozen=True)
class Accuracy(Evaluator):
    """Top-1 accuracy in [0, 1], with its standard error over rows.

    `batch_rows`: rows per forward pass; does not change the result.
    """

    name: str
    batches: Recipe
    batch_rows: int = 64

    def check(self, task: Task) -> None:
        if not isinstance(task, Classifier):
            raise UserError(
                f"eval {self.name}: accuracy needs a classifier and this model is "
                f"{task.objective}; choose eval=loss"
            )

    def __call__(self, task: Task) -> dict[str, float]:
        self.check(task)

        def step(batch: Batch) -> Tensor:
            assert isinstance(task, Classifier)
            few = trimmed(batch)
            logits = task.logits(few)
            if not logits.isfinite().all():
                raise UserError(
                    f"eval {self.name}: a logit is not finite: the model's weights or "
                    "activations contain NaN or infinity"
                )
            return (logits.argmax(-1).cpu() == few["labels"].cpu()).double()

        right = measured(task, self.name, in_rows(self.batches(task), self.batch_rows), step)
        if not right:
            raise UserError(f"eval {self.name}: batches: the data has no rows to classify")
        hits = torch.cat(right)
        rows, share = len(hits), float(hits.mean())
        error = math.sqrt(share * (1 - share) / (rows - 1)) if rows > 1 else math.nan
        return {"acc": share, "acc_stderr": error, "rows": float(rows)}

    @property
    def higher_is_better(self) -> Collection[str]:
        return ("acc",)

    def definition(self) -> dict[str, Any]:
        return {"kind": "Accuracy", "batches": self.batches.definition()}

    def files(self) -> list[Path]:
        return self.batches.files()

    def reads(self) -> list[tuple[Corpus, str]]:
        return self.batches.reads()
