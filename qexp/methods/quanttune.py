"""QuantTune (2403.06497): fine-tuning with a penalty on outliers, then quantization."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

from qexp.common import hashes, numerics, tokenizer_hash
from qexp.common.cache import Cache, checksum
from qexp.data.recipe import Recipe
from qexp.methods.finetune import FineTune
from qexp.models.state_diff import apply_diff, checksums, state_diff
from qexp.quantizers.scheme import Activations
from qexp.step import Record, Step
from qexp.task import Batches, Task

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuantTune(Step):
    """Train as `training` says (float weights, a penalty), then quantize the result, so
    that ranges are those of the tuned model.

    Trained weights are kept in the cache: a sweep over grids and calibrators trains once for each
    penalty and seed.
    """

    training: FineTune
    quantization: Step

    @property
    def activations(self) -> Sequence[Activations]:
        return self.quantization.activations

    def recipes(self) -> Mapping[str, Recipe]:
        return self.training.recipes()

    def __call__(self, task: Task, batches: Batches) -> list[Record]:
        once = cache(batches)

        def build() -> dict[str, Tensor]:
            before = checksums(task.model)
            self.training(task, once)
            return state_diff(task.model, before, ())

        apply_diff(task.model, Cache().get("tuned", self._key(task, once), build))
        return self.quantization(task, once)

    def _key(self, task: Task, batches: Batches) -> dict[str, Any]:
        """Everything that the trained weights depend on."""
        own = self.training.recipes()
        tokenizer = "none" if task.tokenizer is None else tokenizer_hash.fingerprint(task.tokenizer)
        return {
            "model": checksum(dict(task.model.state_dict())),
            "tokenizer": tokenizer,
            "data": {name: recipe.definition() for name, recipe in own.items()},
            "batches": [] if "train" in own else [checksum(batch) for batch in batches()],
            "training": repr(self.training),
            **numerics.identity(task.device),
            "code": hashes.code(),
        }
