"""Interface of model sources, and the checks that all of them share."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from qexp.common.errors import UserError
from qexp.grid.scale import DTYPES
from qexp.models.linearize import linearize
from qexp.task import Task

AUTO = {
    "causal_lm": AutoModelForCausalLM,
    "masked_lm": AutoModelForMaskedLM,
    "sequence_classification": AutoModelForSequenceClassification,
    "image_classification": AutoModelForImageClassification,
}


AUTO_DTYPE = "auto"  # float32, or the checkpoint's own dtype where the model is large


class Loaded(NamedTuple):
    """A model on the CPU in eval mode; the tokenizer is None for images and where none exists."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    # Called with the task once it is on its device: attaches the quantizers of an earlier run.
    finish: Callable[[Task], None] = lambda task: None
    # Called before that, also where only the model is wanted: its weights need these online maps.
    put_maps: Callable[[Task], None] = lambda task: None


class ModelSource(ABC):
    """A model that can be loaded, with its identity. Fields are the keys of conf/model/."""

    dtype: str
    objective: str

    @abstractmethod
    def loaded(self) -> Loaded:
        """The model in its settled dtype, every linear map an nn.Linear, no quantization flag."""

    @abstractmethod
    def fingerprint(self) -> dict[str, str]:
        """Everything that the loaded weights and tokenizer depend on."""

    @abstractmethod
    def files(self) -> list[Path]:
        """The local files that loading reads; a run recorded with other files is stale."""

    def config_folder(self) -> Path | None:
        """The folder of the model's config.json, from which its shapes are known without loading
        it; None where there is none on this machine."""
        return None

    def settled_dtype(self) -> str:
        """`dtype`, decided where it is `auto`; the same in every process, nothing loaded."""
        return self.dtype

    def tensor_types(self) -> dict[str, dict[str, int]]:
        """How a GGUF file stores its weights: by type the number of `tensors` and `weights`, and
        the weights that share a scale (`block`; 1: floats). A fact for the record, in no key."""
        return {}

    def origin(self) -> "ModelSource":
        """The source of the model before anything in it was quantized."""
        return self


def check(source: ModelSource, auto: bool = False) -> None:
    """UserError unless `dtype` and `objective` are known: called as a source is built. `auto`:
    whether there is a checkpoint that could have a dtype of its own."""
    known = (*DTYPES, *([AUTO_DTYPE] if auto else []))
    if source.dtype not in known:
        raise UserError(f"model.dtype: {source.dtype!r} is none of {', '.join(known)}")
    if source.objective not in AUTO:
        raise UserError(
            f"model.objective: {source.objective!r} is unknown; choose from {', '.join(AUTO)}"
        )


def ready(model: PreTrainedModel) -> PreTrainedModel:
    """The last step of every `load`: `linearize`, eval mode."""
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False  # models are evaluated on whole sequences
    return linearize(model).eval()
