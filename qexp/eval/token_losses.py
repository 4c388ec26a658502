"""Cross-entropy per token in windows, computed without storing all logits."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from qexp.common.errors import UserError
from qexp.common.progress import bar
from qexp.task import CausalLM, Classifier, Task

Forward = Callable[[Int64[Tensor, "windows tokens"]], Float[Tensor, "windows tokens width"]]


class Window(NamedTuple):
    """The tokens of one forward pass; the last `scored` of them are targets."""

    tokens: Int64[Tensor, " tokens"]
    scored: int


def token_losses(
    task: Task,
    windows: Sequence[Window],
    batch_tokens: int,
    name: str,
    forward: Forward | None = None,
) -> list[Float[Tensor, " scored"]]:
    """The cross-entropy of every target in nats, float32 on the CPU, one tensor per window.

    Logits are computed for a few hundred positions at a time (task.token_losses). forward: gives
    the hidden states; None: one forward pass of the model. Raises UserError with the protocol's
    `name` if a loss is not finite.
    """
    losses: list[Float[Tensor, " scored"]] = []
    for batch, hidden in states(task, windows, batch_tokens, name, forward):
        assert isinstance(task, CausalLM)
        scored = batch[0].scored
        targets = torch.cat([window.tokens[-scored:] for window in batch])
        with torch.no_grad():
            batch_losses = task.token_losses(hidden.flatten(0, 1), targets).cpu()
        if not batch_losses.isfinite().all():
            raise UserError(
                f"eval {name}: the loss is not finite in or near window {len(losses)}: the model's "
                "weights or activations contain NaN or infinity"
            )
        losses.extend(batch_losses.view(len(batch), scored))
    return losses


def states(
    task: Task,
    windows: Sequence[Window],
    batch_tokens: int,
    name: str,
    forward: Forward | None = None,
) -> Iterator[tuple[list[Window], Float[Tensor, "windows scored width"]]]:
    """Batches of windows and the hidden states that predict their targets, without gradient."""
    check_causal(task, name)
    assert isinstance(task, CausalLM)
    for batch in bar(list(_batches(windows, batch_tokens)), name):
        ids = torch.stack([window.tokens for window in batch])
        with torch.no_grad():
            hidden = (forward or task.hidden)(ids[:, :-1])  # the last token has no target
        yield batch, hidden[:, -batch[0].scored :]


def check_causal(task: Task, name: str) -> None:
    """Raises UserError if the model does not predict the next token."""
    if not isinstance(task, CausalLM):
        other = "accuracy" if isinstance(task, Classifier) else "loss"
        raise UserError(
            f"eval {name}: perplexity needs a causal language model and this one is "
            f"{task.objective}; choose eval={other}"
        )


def _batches(windows: Sequence[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """Consecutive windows of equal shape, so without padding; at most `batch_tokens` per batch."""
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
