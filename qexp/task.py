"""The model as Lightning and the rest of the project see it: something with a loss."""

from abc import abstractmethod

import lightning as L
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qexp.arch import Arch, arch_of

Batch = dict[str, Tensor]

# Positions whose logits exist at one time; at a 128k vocabulary and float32 that is 0.26 GB.
POSITIONS = 512


class Task(L.LightningModule):
    """A model with the facts of its family; subclasses say what its loss is."""

    objective: str

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.arch: Arch = arch_of(model)
        # Live quantizers of activations by site; parameters of theirs train with the model's.
        self.quantizers = torch.nn.ModuleDict()

    @property
    def device(self) -> torch.device:
        """Where tokens go in and logits come out; offloaded blocks rest elsewhere."""
        return next(self.model.get_submodule(self.arch.head).parameters()).device

    @property
    def blocks(self) -> torch.nn.ModuleList:
        blocks = self.model.get_submodule(self.arch.blocks)
        assert isinstance(blocks, torch.nn.ModuleList)
        return blocks

    @abstractmethod
    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        """The mean loss of a batch."""

    def encode(self, batch: Batch) -> Tensor:
        """Everything but the head and the loss: the hidden states of the last layer."""
        inputs = {key: value.to(self.device) for key, value in batch.items() if key != "labels"}
        return self.model.base_model(**inputs)[0]

    def training_step(self, batch: Batch, index: int) -> Float[Tensor, ""]:
        loss = self.loss(batch)
        self.log("loss", loss, prog_bar=True)
        return loss


class CausalLM(Task):
    """Next-token prediction on {"input_ids": [sequences, tokens]}."""

    objective = "causal_lm"

    def hidden(self, input_ids: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens width"]:
        """The final hidden states, normed: what the head reads."""
        return self.encode({"input_ids": input_ids})

    def head(self, hidden: Float[Tensor, "*shape width"]) -> Float[Tensor, "*shape vocabulary"]:
        return self.model.get_submodule(self.arch.head)(hidden)

    def token_losses(
        self, hidden: Float[Tensor, "positions width"], targets: Int[Tensor, " positions"]
    ) -> Float[Tensor, " positions"]:
        """Cross-entropy in nats of each position, float32, a few positions' logits at a time."""
        losses = [
            F.cross_entropy(self.head(h).float(), t.to(h.device), reduction="none")
            for h, t in zip(hidden.split(POSITIONS), targets.split(POSITIONS), strict=True)
        ]
        return torch.cat(losses)

    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        ids = batch["input_ids"]
        hidden = self.hidden(ids)
        return self.token_losses(hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).mean()


class _WithLabels(Task):
    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        return self.model(**{key: value.to(self.device) for key, value in batch.items()}).loss


class MaskedLM(_WithLabels):
    """Prediction of masked tokens: labels -100 elsewhere."""

    objective = "masked_lm"


class ImageClassifier(_WithLabels):
    """Classes of {"pixel_values", "labels"}."""

    objective = "image_classification"


TASKS: dict[str, type[Task]] = {
    kind.objective: kind for kind in (CausalLM, MaskedLM, ImageClassifier)
}
