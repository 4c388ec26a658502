"""Calibration recipe: windows of one corpus as a calibration or training batch."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from qexp.common.errors import UserError
from qexp.data import classification, sampling
from qexp.data.corpus import Corpus
from qexp.data.recipe import Batch, Recipe
from qexp.data.tokens import (
    BOS,
    check_length,
    followed_bos,
    running,
    warn_without_bos,
    window_bos,
    with_bos,
)
from qexp.task import Task

log = logging.getLogger(__name__)
IGNORED = -100  # the label of tokens without a loss: torch's convention
MASKED_SHARE = 0.15


@dataclass(frozen=True)
class Calibration(Recipe):
    """`sequences` windows of `length` tokens from one split of a corpus, as one batch.

    split: null is the corpus's calibration split.
    sampling: a key of SAMPLINGS.
    join: null takes the running text of the corpus; a string joins the documents by it.
    bos: `none`; `start`, the special tokens that the tokenizer adds to a text; `each`, BOS in the
    place of every window's first token, where the tokenizer puts it before a text; `auto`, the same
    and also for a family that was trained behind BOS. BOS is no target of the loss, the token after
    it is.
    share: with `shuffled`, this share of all windows instead of `sequences` of them.

    Classifiers get `sequences` labelled rows: the first of the split or, with any other sampling,
    rows drawn with `seed`.
    """

    corpus: Corpus
    split: str | None = None
    sampling: str = "first"
    join: str | None = None
    bos: str = "none"
    sequences: int = 32
    length: int = 512
    seed: int = 0
    share: float | int | None = None

    def __post_init__(self) -> None:
        for key, value, known in (
            ("sampling", self.sampling, tuple(SAMPLINGS)),
            ("bos", self.bos, BOS),
        ):
            if value not in known:
                raise UserError(
                    f"calibration.{key}: {value!r} is unknown; choose from {', '.join(known)}"
                )
        for key, number, least in (("sequences", self.sequences, 1), ("length", self.length, 2)):
            if number < least:
                raise UserError(f"calibration.{key}: {number} must be at least {least}")
        if self.share is not None and not (self.sampling == "shuffled" and 0 < self.share <= 1):
            raise UserError(
                f"calibration.share: {self.share} must lie in (0, 1], with sampling=shuffled"
            )

    def __call__(self, task: Task) -> list[Batch]:
        return [BATCHES[task.objective](self, task)]

    def definition(self) -> dict[str, Any]:
        split = self.chosen_split()
        settings = {key: value for key, value in vars(self).items() if key != "corpus"}
        content = {"name": self.corpus.name, "sha256": self.corpus.fingerprint(split)}
        return {**settings, "split": split, "corpus": content}

    def followed(self, task: Task) -> dict[str, Any]:
        return followed_bos(self.bos, task)

    def files(self) -> list[Path]:
        return self.corpus.files(self.chosen_split())

    def reads(self) -> list[tuple[Corpus, str]]:
        return [(self.corpus, self.chosen_split())]

    def windows(self, task: Task, length: int) -> Int64[Tensor, "sequences length"]:
        """The token ids. A short text gives fewer windows and a warning; none is a UserError."""
        check_length(task.model, self.length, "calibration.length")
        warn_without_bos("calibration", self.bos, task)
        windows = SAMPLINGS[self.sampling](self, task, length)
        windows = with_bos(windows, window_bos(self.bos, task))
        count, text = len(windows), f"the {self.chosen_split()} split of {self.corpus.name}"
        if count == 0:
            raise UserError(
                f"calibration.length: {text} is shorter than one window of {length} tokens; "
                "choose a smaller length or another text"
            )
        if self.share is None and count < self.sequences:
            log.warning(
                "calibration.sequences=%d: %s has only %d windows of %d tokens; using these",
                *(self.sequences, text, count, length),
            )
        return windows

    def rows(self, total: int) -> Sequence[int]:
        """Indices of the labelled rows to use, of `total`: the first with sampling `first`, else
        drawn with the seed."""
        wanted = self.sequences if self.share is None else max(round(self.share * total), 1)
        if wanted > total:
            log.warning(
                "calibration.sequences=%d: %s has only %d labelled rows; using these",
                *(wanted, self.corpus.name, total),
            )
        count = min(wanted, total)
        if self.sampling == "first":
            return range(count)
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randperm(total, generator=generator)[:count].tolist()

    def chosen_split(self) -> str:
        return self.split or self.corpus.calibration_split

    def _running(self, task: Task, length: int) -> Int64[Tensor, " tokens"]:
        enough = self.sequences * length + 1
        return running(
            task, self.corpus, self.chosen_split(), self.join, bos=self.bos, enough=enough
        )

    def _documents(self, task: Task, draw: Callable[..., Tensor], length: int) -> Tensor:
        if task.tokenizer is None:
            raise UserError(
                f"calibration.sampling: {self.sampling} needs a tokenizer and this model has none; "
                "choose sampling=first"
            )
        documents = self.corpus.documents(self.chosen_split())
        special = self.bos == "start"
        return draw(task.tokenizer, documents, length, self.sequences, self.seed, special)


def _first(recipe: Calibration, task: Task, length: int) -> Tensor:
    return sampling.consecutive(recipe._running(task, length), length, recipe.sequences)


def _shuffled(recipe: Calibration, task: Task, length: int) -> Tensor:
    ids = recipe._running(task, length)
    windows = sampling.consecutive(ids, length, len(ids))
    count = recipe.sequences
    if recipe.share is not None:
        count = max(round(recipe.share * len(windows)), 1)
    generator = torch.Generator().manual_seed(recipe.seed)
    return windows[torch.randperm(len(windows), generator=generator)[:count]]


def _random_windows(recipe: Calibration, task: Task, length: int) -> Tensor:
    ids = recipe._running(task, length)
    return sampling.random_windows(ids, length, recipe.sequences, recipe.seed)


def _random_documents(recipe: Calibration, task: Task, length: int) -> Tensor:
    return recipe._documents(task, sampling.random_documents, length)


def _short_documents(recipe: Calibration, task: Task, length: int) -> Tensor:
    return recipe._documents(task, sampling.short_documents, length)


SAMPLINGS: dict[str, Callable[[Calibration, Task, int], Tensor]] = {
    "first": _first,
    "shuffled": _shuffled,
    "random_windows": _random_windows,
    "random_documents": _random_documents,
    "short_documents": _short_documents,
}


def _causal(recipe: Calibration, task: Task) -> Batch:
    return {"input_ids": recipe.windows(task, recipe.length)}


def _masked(recipe: Calibration, task: Task) -> Batch:
    """15 % of the tokens, at least one per sequence, are masked; they are the labels.

    Each sequence is enclosed in [CLS] and [SEP] where the tokenizer has them.
    """
    tokenizer = task.tokenizer
    if tokenizer is None or tokenizer.mask_token_id is None:
        raise UserError("model: masked language modelling needs a tokenizer with a mask token")
    special = (tokenizer.cls_token_id, tokenizer.sep_token_id)
    enclosed = None not in special
    ids = recipe.windows(task, recipe.length - 2 if enclosed else recipe.length)
    generator = torch.Generator().manual_seed(recipe.seed)
    chance = torch.rand(ids.shape, generator=generator)
    masked = (chance < MASKED_SHARE) | (chance == chance.amin(dim=1, keepdim=True))
    labels = ids.where(masked, IGNORED)
    ids = ids.masked_fill(masked, tokenizer.mask_token_id)
    if enclosed:
        first, last = (ids.new_full((len(ids), 1), token) for token in special)
        ignored = torch.full_like(first, IGNORED)
        ids = torch.cat([first, ids, last], dim=1)
        labels = torch.cat([ignored, labels, ignored], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _labelled(recipe: Calibration, task: Task) -> Batch:
    make = classification.BATCHES[task.objective]
    return make(task, recipe.corpus, recipe.chosen_split(), recipe.rows, recipe.length)


BATCHES: dict[str, Callable[[Calibration, Task], Batch]] = {
    "causal_lm": _causal,
    "masked_lm": _masked,
    **dict.fromkeys(classification.BATCHES, _labelled),
}
