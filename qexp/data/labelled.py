"""Labelled rows as batches: texts and images for classification."""

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qexp.errors import UserError
from qexp.task import Batch, Task

if TYPE_CHECKING:
    from qexp.data.calibration import Calibration

log = logging.getLogger(__name__)


def sentences(recipe: "Calibration", task: Task) -> Batch:
    """Texts or pairs of texts, cut to `length` tokens and padded to the longest."""
    tokenizer = task.tokenizer
    if tokenizer is None or tokenizer.pad_token_id is None:
        raise UserError("model: classification of texts needs a tokenizer with a padding token")
    examples = recipe.corpus.examples(recipe.chosen_split())
    chosen = [examples[row] for row in rows(recipe, len(examples))]
    labels = torch.tensor([example.label for example in chosen])
    refuse(labels, task, recipe.corpus.name)
    seconds = [example.second for example in chosen]
    batch = tokenizer(
        [example.text for example in chosen],
        None if None in seconds else seconds,
        truncation=True,
        max_length=recipe.length,
        padding=True,
        return_tensors="pt",
    )
    return {**batch, "labels": labels}


def images(recipe: "Calibration", task: Task) -> Batch:
    """Pixels as the model takes them."""
    config, split = task.model.config, recipe.chosen_split()
    shape = (config.num_channels, config.image_size, config.image_size)
    chosen = rows(recipe, recipe.corpus.total(split))
    pixels, labels = recipe.corpus.images(split, shape, config.num_labels, chosen)
    refuse(labels, task, recipe.corpus.name)
    return {"pixel_values": pixels, "labels": labels}


def rows(recipe: "Calibration", total: int) -> Sequence[int]:
    """Which of `total` rows: with sampling `first` the first, else some that the seed draws."""
    wanted = recipe.sequences if recipe.share is None else max(round(recipe.share * total), 1)
    if wanted > total:
        log.warning(
            "calibration.sequences=%d: %s has only %d labelled rows; using these",
            *(wanted, recipe.corpus.name, total),
        )
    count = min(wanted, total)
    if recipe.sampling == "first":
        return range(count)
    generator = torch.Generator().manual_seed(recipe.seed)
    return torch.randperm(total, generator=generator)[:count].tolist()


def refuse(labels: Tensor, task: Task, name: str) -> None:
    """UserError for labels that the model has no class for."""
    classes = task.model.config.num_labels
    if int(labels.max()) >= classes or int(labels.min()) < 0:
        raise UserError(
            f"data={name}: has the class {int(labels.max())}, and the model {classes} classes; "
            "choose another split or data set, or model.head.classes"
        )


BATCHES: dict[str, Callable[["Calibration", Task], Batch]] = {
    "sequence_classification": sentences,
    "image_classification": images,
}
