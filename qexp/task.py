"""Tasks: a model with its loss and the facts of its family, as a LightningModule."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import lightning as L
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qexp.arch import Arch, arch_of
from qexp.common.errors import UserError
from qexp.common.workspace import Workspace

Batch = dict[str, Tensor]
Batches = Callable[[], list[Batch]]

# Bytes of the logits that exist at one time, at least. glibc returns a block of this size to the
# system when it is freed. Smaller ones leave gaps, of which the next chunk does not fit into any.
LOGITS = 2**25


class Task(L.LightningModule):
    """A model with the facts of its family; subclasses define its loss."""

    objective: str

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.arch: Arch = arch_of(model)
        # Activation quantizers by site; their parameters train with those of the model.
        self.quantizers = torch.nn.ModuleDict()
        # Online maps by site: the model's weights hold their inverses.
        self.maps = torch.nn.ModuleDict()
        # Shares of the low and high end that the dynamic ranges of sites keep, where learned.
        self.shares: dict[str, tuple[float, float]] = {}
        self.workspace = Workspace()
        self._sampler: torch.Generator | None = None
        # Loads the model as it was before any change; a run sets it.
        self.original: Callable[[], PreTrainedModel] | None = None

    @property
    def device(self) -> torch.device:
        """The device of tokens and logits; offloaded blocks are on the host between their uses."""
        return next(self.model.get_submodule(self.arch.head).parameters()).device

    @property
    def blocks(self) -> torch.nn.ModuleList:
        blocks = self.model.get_submodule(self.arch.blocks)
        assert isinstance(blocks, torch.nn.ModuleList)
        return blocks

    def linears(self) -> dict[str, torch.nn.Linear]:
        """The quantized linears: those of every block, by full name, in execution order."""
        found = {}
        for index, block in enumerate(self.blocks):
            for name in (name for group in self.arch.groups for name in group.linears):
                linear = block.get_submodule(name)
                assert isinstance(linear, torch.nn.Linear)
                found[f"{self.arch.blocks}.{index}.{name}"] = linear
        return found

    @contextmanager
    def labels(self, kind: str, seed: int) -> Iterator[None]:
        """Within the context, losses are against the data (`data`) or against labels drawn from the
        model's own distribution (`sampled`), as in the true Fisher matrix."""
        self._sampler = torch.Generator(self.device) if kind == "sampled" else None
        if self._sampler is not None:
            self._sampler.manual_seed(seed)
        try:
            yield
        finally:
            self._sampler = None

    @abstractmethod
    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        """The mean loss of a batch."""

    def encode(self, batch: Batch) -> Tensor:
        """The hidden states of the last layer: the forward pass without head and loss."""
        inputs = {key: value.to(self.device) for key, value in batch.items() if key != "labels"}
        return self.model.base_model(**inputs)[0]

    def training_step(self, batch: Batch, index: int) -> Float[Tensor, ""]:
        loss = self.loss(batch)
        self.log("loss", loss, prog_bar=True)
        return loss


def positions(vocabulary: int, itemsize: int) -> int:
    """Positions whose logits exist at one time: those of `LOGITS` bytes, in 64s."""
    return 64 * -(-LOGITS // (64 * vocabulary * itemsize))


class CausalLM(Task):
    """Next-token prediction on {"input_ids": [sequences, tokens]}."""

    objective = "causal_lm"

    @property
    def positions(self) -> int:
        vocabulary = self.model.get_submodule(self.arch.head).weight
        return positions(len(vocabulary), vocabulary.element_size())

    def hidden(self, input_ids: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens width"]:
        """The final hidden states after the last norm: the input of the head."""
        return self.encode({"input_ids": input_ids})

    def head(self, hidden: Float[Tensor, "*shape width"]) -> Float[Tensor, "*shape vocabulary"]:
        return self.model.get_submodule(self.arch.head)(hidden)

    def logits(
        self,
        hidden: Float[Tensor, "positions width"],
        head: nn.Module | None = None,
    ) -> Iterator[Float[Tensor, "chunk vocabulary"]]:
        """Logits in float32, a chunk of `positions` at a time.

        head: of another model, in place of this one's.
        """
        for chunk in hidden.split(self.positions):
            yield (self.head(chunk) if head is None else head(chunk)).float()

    def token_losses(
        self, hidden: Float[Tensor, "positions width"], targets: Int[Tensor, " positions"]
    ) -> Float[Tensor, " positions"]:
        """Cross-entropy of each position in nats, float32; logits exist for one chunk at a time."""
        losses, rest = [], targets
        for logits in self.logits(hidden):
            labels, rest = rest[: len(logits)], rest[len(logits) :]
            if self._sampler is not None:
                drawn = logits.detach().softmax(-1).multinomial(1, generator=self._sampler)
                labels = drawn.flatten()
            losses.append(F.cross_entropy(logits, labels.to(logits.device), reduction="none"))
            del logits  # else two chunks of them were in memory while the next one is computed
        return torch.cat(losses)

    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        ids = batch["input_ids"]
        hidden = self.hidden(ids)
        return self.token_losses(hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).mean()


class _WithLabels(Task):
    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        if self._sampler is not None:
            raise UserError(
                "method.hessian.labels=sampled: only causal language models draw labels; give data."
            )
        return self.model(**{key: value.to(self.device) for key, value in batch.items()}).loss


class MaskedLM(_WithLabels):
    """Prediction of masked tokens: labels -100 elsewhere."""

    objective = "masked_lm"


class Classifier(_WithLabels):
    """One class per row."""

    def logits(self, batch: Batch) -> Float[Tensor, "rows classes"]:
        inputs = {key: value.to(self.device) for key, value in batch.items() if key != "labels"}
        logits: Tensor = self.model(**inputs).logits
        return logits


class SequenceClassifier(Classifier):
    """Classes of texts, {"input_ids", "attention_mask", …, "labels"}, padded at their ends."""

    objective = "sequence_classification"


class ImageClassifier(Classifier):
    """Classes of {"pixel_values", "labels"}."""

    objective = "image_classification"


TASKS: dict[str, type[Task]] = {
    kind.objective: kind for kind in (CausalLM, MaskedLM, SequenceClassifier, ImageClassifier)
}


def trimmed(batch: Batch) -> Batch:
    """The batch without the columns in which every row is padding; losses are unchanged."""
    mask = batch.get("attention_mask")
    if mask is None or bool(mask[:, -1].any()):
        return batch
    length = int(mask.any(0).nonzero()[-1]) + 1
    return {key: x[:, :length] if x.shape == mask.shape else x for key, x in batch.items()}


def in_rows(batches: Iterable[Batch], rows: int) -> list[Batch]:
    """The rows of each batch in order, at most `rows` of them together."""
    return [
        {key: value[start : start + rows] for key, value in batch.items()}
        for batch in batches
        for start in range(0, len(next(iter(batch.values()))), rows)
    ]


def singly(batches: Iterable[Batch]) -> list[Batch]:
    """Each row as a batch of its own, without padding."""
    return [trimmed(row) for row in in_rows(batches, 1)]
