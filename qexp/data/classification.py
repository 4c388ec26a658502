"""Batches of labelled texts or images for classification."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qexp.common.errors import UserError
from qexp.data.corpus import Corpus
from qexp.task import Batch, Task

# The total number of rows → the indices of the chosen ones.
Choose = Callable[[int], Sequence[int]]


def sentences(task: Task, corpus: Corpus, split: str, choose: Choose, length: int) -> Batch:
    """Texts or pairs of texts, truncated to `length` tokens and padded to the longest."""
    tokenizer = task.tokenizer
    if tokenizer is None or tokenizer.pad_token_id is None:
        raise UserError("model: classification of texts needs a tokenizer with a padding token")
    examples = corpus.examples(split)
    chosen = [examples[row] for row in choose(len(examples))]
    labels = torch.tensor([example.label for example in chosen])
    refuse(labels, task, corpus.name)
    seconds = [example.second for example in chosen]
    batch = tokenizer(
        [example.text for example in chosen],
        None if None in seconds else seconds,
        truncation=True,
        max_length=length,
        padding=True,
        return_tensors="pt",
    )
    return {**batch, "labels": labels}


def images(task: Task, corpus: Corpus, split: str, choose: Choose, length: int) -> Batch:
    """Pixels in the model's input shape; `length` is ignored."""
    config = task.model.config
    shape = (config.num_channels, config.image_size, config.image_size)
    chosen = choose(corpus.total(split))
    pixels, labels = corpus.images(split, shape, config.num_labels, chosen)
    refuse(labels, task, corpus.name)
    return {"pixel_values": pixels, "labels": labels}


def refuse(labels: Tensor, task: Task, name: str) -> None:
    """UserError for labels outside the model's classes."""
    classes = task.model.config.num_labels
    if int(labels.max()) >= classes or int(labels.min()) < 0:
        raise UserError(
            f"data={name}: has the label {int(labels.max())}, but the model has {classes} classes; "
            "choose another split or data set, or set model.head.classes"
        )


BATCHES: dict[str, Callable[[Task, Corpus, str, Choose, int], Batch]] = {
    "sequence_classification": sentences,
    "image_classification": images,
}
