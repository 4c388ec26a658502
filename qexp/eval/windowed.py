"""Perplexity over windows of text, as a ratio of summed losses to units."""

import logging
import math
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.common.errors import UserError
from qexp.data.corpus import Corpus
from qexp.eval.base import Evaluator, dtype_of
from qexp.eval.token_losses import Window, check_causal, token_losses
from qexp.grid.scale import DTYPES
from qexp.task import Task

log = logging.getLogger(__name__)


def ratio(
    totals: Float[Tensor, " samples"], units: Float[Tensor, " samples"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """sum(totals) / sum(units), and its standard error over samples by the delta method.

    The standard error is NaN for one sample.
    """
    rate = totals.sum() / units.sum()
    count = len(totals)
    spread = ((totals - rate * units) ** 2).sum() / units.sum() ** 2
    return rate, (spread * count / (count - 1)).sqrt() if count > 1 else torch.tensor(math.nan)


class Passage(NamedTuple):
    """One sample for the standard error: its windows, and its number of units."""

    windows: list[Window]
    units: int


@dataclass(frozen=True, kw_only=True)
class Windowed(Evaluator):
    """exp(sum of the losses of all scored tokens / units). A unit is a scored token by default.

    `batch_tokens`: tokens that go through the model at once; changes no number. `dtype`: of the
    models in the papers that define the protocol (null: none is known); a model of another one is
    measured as it is, with a warning and a record. No part of the definition: what the model
    computes in is the model's (`model.dtype`).
    """

    name: str
    corpus: Corpus
    split: str
    batch_tokens: int = 2048
    dtype: str | None = None

    def check(self, task: Task) -> None:
        check_causal(task, self.name)
        if self.dtype not in (None, *DTYPES):
            raise UserError(
                f"eval {self.name}: dtype {self.dtype!r} is none of {', '.join(DTYPES)}"
            )
        if self.dtype not in (None, own := dtype_of(task)):
            log.warning(
                "eval %s: published numbers are of %s models and this one is %s, which can move "
                "the second decimal; for theirs: model.dtype=%s",
                self.name,
                self.dtype,
                own,
                self.dtype,
            )

    @abstractmethod
    def passages(self, task: Task) -> list[Passage]:
        """The windows of the text, by sample of the standard error."""

    def token_losses(self, task: Task) -> list[Float[Tensor, " scored"]]:
        """The loss in nats of every scored token, one tensor per window."""
        return self._losses(task, self.passages(task))

    def losses(self, task: Task) -> Float[Tensor, " windows"]:
        """The mean loss of each window, in nats per token."""
        return torch.stack([losses.mean() for losses in self.token_losses(task)])

    def __call__(self, task: Task) -> dict[str, float]:
        """`ppl` with its standard error over passages, and the numbers of windows and tokens."""
        passages = self.passages(task)
        losses = iter(self._losses(task, passages))
        totals = torch.tensor(
            [sum(float(next(losses).double().sum()) for _ in part.windows) for part in passages],
            dtype=torch.float64,
        )
        units = torch.tensor([part.units for part in passages], dtype=torch.float64)
        rate, error = ratio(totals, units)
        windows = [window for part in passages for window in part.windows]
        return {
            "ppl": float(rate.exp()),
            "ppl_stderr": float(rate.exp() * error),
            "windows": float(len(windows)),
            "tokens": float(sum(window.scored for window in windows)),
        }

    def definition(self) -> dict[str, Any]:
        settings = {
            key: value
            for key, value in vars(self).items()
            if key not in ("name", "corpus", "batch_tokens", "dtype")
        }
        content = {"name": self.corpus.name, "sha256": self.corpus.fingerprint(self.split)}
        return {"kind": type(self).__name__, **settings, "corpus": content}

    def facts(self, task: Task) -> dict[str, Any]:
        named = {} if self.dtype is None else {"protocol_dtype": self.dtype}
        return Evaluator.facts(self, task) | named

    def files(self) -> list[Path]:
        return self.corpus.files(self.split)

    def reads(self) -> list[tuple[Corpus, str]]:
        return [(self.corpus, self.split)]

    def _losses(self, task: Task, passages: list[Passage]) -> list[Float[Tensor, " scored"]]:
        windows = [window for passage in passages for window in passage.windows]
        return token_losses(task, windows, self.batch_tokens, self.name)

    def too_short(self, tokens: int, length: int) -> UserError:
        return UserError(
            f"eval {self.name}: the {self.split} split of {self.corpus.name} has {tokens} tokens, "
            f"fewer than one window of {length}; choose a smaller length or another text"
        )
