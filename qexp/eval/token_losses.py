"""Cross-entropy per token in windows, computed without storing all logits."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from qexp.common.errors import UserError
from qexp.eval.loop import measured
from qexp.task import CausalLM, Classifier, Task

Forward = Callable[[Int64[Tensor, "windows tokens"]], Float[Tensor, "windows tokens width"]]


SHARED = 256 * 2**20  # bytes of hidden states that wait for another evaluation


class Window(NamedTuple):
    """The tokens of one forward pass; the last `scored` of them are targets."""

    tokens: Int64[Tensor, " tokens"]
    scored: int


class Batch(NamedTuple):
    """Windows of one forward pass, of equal shape; `first` counts the windows before them."""

    windows: list[Window]
    first: int


@dataclass
class Shared:
    """Hidden states on the CPU by the tokens of their batch, each until its second use."""

    kept: dict[tuple[int, bytes], Tensor] = field(default_factory=dict)
    bytes: int = 0

    def get(self, batch: Batch, build: Callable[[], Tensor]) -> Tensor:
        tokens = torch.stack([window.tokens for window in batch.windows]).cpu().numpy().tobytes()
        key = batch.windows[0].scored, tokens
        if (kept := self.kept.pop(key, None)) is not None:
            self.bytes -= kept.nbytes
            return kept
        if self.bytes + (built := build()).nbytes <= SHARED:
            self.kept[key] = built.cpu()
            self.bytes += built.nbytes
        return built


_shared: ContextVar[Shared | None] = ContextVar("shared", default=None)


@contextmanager
def shared() -> Iterator[None]:
    """Inside, windows that two evaluations of one unchanged model have in common, such as a
    perplexity and its distance from the float model, go through the model once."""
    token = _shared.set(Shared())
    try:
        yield
    finally:
        _shared.reset(token)


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
    check_causal(task, name)
    batches = list(batched(windows, batch_tokens))

    def step(batch: Batch) -> Float[Tensor, "windows scored"]:
        assert isinstance(task, CausalLM)
        hidden = states(task, batch, forward)
        losses = task.token_losses(hidden.flatten(0, 1), targets(batch)).cpu()
        if not losses.isfinite().all():
            raise UserError(
                f"eval {name}: the loss is not finite in or near window {batch.first}: the model's "
                "weights or activations contain NaN or infinity"
            )
        return losses.view(len(batch.windows), -1)

    return [losses for part in measured(task, name, batches, step) for losses in part]


def states(
    task: CausalLM, batch: Batch, forward: Forward | None = None
) -> Float[Tensor, "windows scored width"]:
    """The hidden states that predict the targets of a batch."""

    def build() -> Tensor:
        ids = torch.stack([window.tokens for window in batch.windows])
        hidden = (forward or task.hidden)(ids[:, :-1])  # the last token has no target
        return hidden[:, -batch.windows[0].scored :]

    if (store := _shared.get()) is None or forward is not None:
        return build()
    return store.get(batch, build).to(task.device)


def targets(batch: Batch) -> Int64[Tensor, " targets"]:
    """The targets of all windows of a batch."""
    return torch.cat([window.tokens[-window.scored :] for window in batch.windows])


def check_causal(task: Task, name: str) -> None:
    """Raises UserError if the model does not predict the next token."""
    if not isinstance(task, CausalLM):
        other = "accuracy" if isinstance(task, Classifier) else "loss"
        raise UserError(
            f"eval {name}: perplexity needs a causal language model and this one is "
            f"{task.objective}; choose eval={other}"
        )


def batched(windows: Sequence[Window], batch_tokens: int) -> Iterator[Batch]:
    """Consecutive windows of equal shape, so without padding; at most `batch_tokens` per batch."""
    batch: list[Window] = []
    for at, window in enumerate(windows):
        shape = (len(window.tokens), window.scored)
        if batch and (
            shape != (len(batch[0].tokens), batch[0].scored)
            or (len(batch) + 1) * len(window.tokens) > batch_tokens
        ):
            yield Batch(batch, at - len(batch))
            batch = []
        batch.append(window)
    if batch:
        yield Batch(batch, len(windows) - len(batch))
