"""Losses of tokens in windows, with the logits streamed."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from qexp.common.errors import UserError
from qexp.common.progress import bar
from qexp.task import CausalLM, Classifier, Task


class Window(NamedTuple):
    """Tokens that the model sees together; the last `scored` of them are targets."""

    tokens: Int64[Tensor, " tokens"]
    scored: int


def token_losses(
    task: Task, windows: Sequence[Window], batch_tokens: int, name: str
) -> list[Float[Tensor, " scored"]]:
    """The cross-entropy of every target in nats, in float32, per window, on the CPU.

    Logits exist for a few hundred positions at a time (task.token_losses). A loss that is not
    finite raises a UserError that names the protocol.
    """
    losses: list[Float[Tensor, " scored"]] = []
    for batch, hidden in states(task, windows, batch_tokens, name):
        assert isinstance(task, CausalLM)
        scored = batch[0].scored
        targets = torch.cat([window.tokens[-scored:] for window in batch])
        with torch.no_grad():
            found = task.token_losses(hidden.flatten(0, 1), targets).cpu()
        if not found.isfinite().all():
            raise UserError(
                f"eval {name}: the loss of window {len(losses)} or near it is not a finite "
                "number: there is NaN or infinity in the model's weights or activations"
            )
        losses.extend(found.view(len(batch), scored))
    return losses


def states(
    task: Task, windows: Sequence[Window], batch_tokens: int, name: str
) -> Iterator[tuple[list[Window], Float[Tensor, "windows scored width"]]]:
    """Windows of one shape and the hidden states that predict their targets, without gradient."""
    check_causal(task, name)
    assert isinstance(task, CausalLM)
    for batch in bar(list(_batches(windows, batch_tokens)), name):
        ids = torch.stack([window.tokens for window in batch])
        with torch.no_grad():
            hidden = task.hidden(ids[:, :-1])  # the last token predicts none
        yield batch, hidden[:, -batch[0].scored :]


def check_causal(task: Task, name: str) -> None:
    """UserError for a model that does not predict the next token."""
    if not isinstance(task, CausalLM):
        other = "accuracy" if isinstance(task, Classifier) else "loss"
        raise UserError(
            f"eval {name}: perplexity needs a causal language model and this one is "
            f"{task.objective}; choose eval={other}"
        )


def _batches(windows: Sequence[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """Neighbours of equal shape, up to `batch_tokens` together: no padding anywhere."""
    batch: list[Window] = []
    for window in windows:
        shape = (len(window.tokens), window.scored)
        if batch and (
            shape != (len(batch[0].tokens), batch[0].scored)
            or (len(batch) + 1) * len(window.tokens) > batch_tokens
        ):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch
