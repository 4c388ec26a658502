"""Checked loading with transformers' from_pretrained, for hub ids, folders and GGUF files."""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from qexp.common.errors import UserError, first_line
from qexp.grid.scale import DTYPES
from qexp.models.base import AUTO, ModelSource

log = logging.getLogger(__name__)

# Weights from which on `model.dtype=auto` is the checkpoint's own dtype: 4 GB in float32.
LARGE = 10**9


@dataclass(frozen=True)
class Head:
    """A classification head of `classes`, initialized from `seed` unless the checkpoint has one."""

    classes: int
    seed: int = 0


def pretrained(
    where: str, name: str, source: ModelSource, head: Head | None = None, **options: Any
) -> PreTrainedModel:
    """The model of a hub id or folder `where`. UserError if weights outside `head` are missing.

    name: the config key and value, for error messages. transformers initializes missing weights
    randomly and only warns, so that an untrained model would be evaluated.
    """
    if head is not None:
        if not source.objective.endswith("classification"):
            raise UserError(f"model.head: {source.objective} has no classes; leave it null")
        options |= {"num_labels": head.classes, "ignore_mismatched_sizes": True}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0 if head is None else head.seed)
        return _complete(AUTO[source.objective], where, name, source, head, **options)


def from_state(
    state: dict[str, Tensor], config: PretrainedConfig, name: str, source: ModelSource
) -> PreTrainedModel:
    """The model of a configuration with these tensors. Errors as `pretrained`."""
    with torch.device("meta"):
        family = type(AUTO[source.objective].from_config(config))
    return _complete(family, None, name, source, None, config=config, state_dict=state)


def _complete(
    loader: Any,
    where: str | None,
    name: str,
    source: ModelSource,
    head: Head | None,
    **options: Any,
) -> PreTrainedModel:
    model, report = loader.from_pretrained(
        where,
        dtype=DTYPES[source.settled_dtype()],
        output_loading_info=True,
        low_cpu_mem_usage=True,
        **options,
    )
    missing = sorted(report["missing_keys"])
    if head is not None:  # the head is everything outside the base model
        base = f"{model.base_model_prefix}."
        missing = [key for key in missing if key.startswith(base)]
    if missing:
        raise UserError(
            f"{name}: the checkpoint has no {missing[0]} ({len(missing)} missing), which "
            f"model.objective={source.objective} needs; choose a checkpoint with it or another "
            "objective, or give a classifier a new head (model.head)"
        )
    return model


def skeleton(config: PretrainedConfig, source: ModelSource) -> PreTrainedModel:
    """The model of a configuration without weights: on the device `meta`."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model: PreTrainedModel = AUTO[source.objective].from_config(config)
        return model


def automatic(weights: int, own: str) -> str:
    """What `auto` resolves to: the checkpoint's dtype above the size limit, else float32."""
    return own if weights >= LARGE else "float32"


def checkpoint_dtype(folder: str, name: str, source: ModelSource) -> str:
    """What `auto` is for the checkpoint of a `folder`, by its config.json, which names the dtype
    and gives the number of weights. A large one that names none is float32, with a warning."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        weights = skeleton(config, source).num_parameters()
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{name}: model.dtype=auto needs the size that config.json gives, and it gives none "
            f"({first_line(error)}); say model.dtype={'|'.join(DTYPES)}"
        ) from error
    own = str(config.dtype or config.get_text_config().dtype).removeprefix("torch.")
    if own not in DTYPES:
        own = "float32"
        if weights >= LARGE:
            log.warning("%s: config.json names none of %s; loading float32", name, list(DTYPES))
    return automatic(weights, own)


def marked(fingerprint: dict[str, str], head: Head | None) -> dict[str, str]:
    """The fingerprint of a model with that head."""
    return fingerprint if head is None else {**fingerprint, "head": repr(head)}


def refuse_quantized(config: dict[str, Any], name: str) -> None:
    """UserError for a quantized checkpoint. config: the content of its config.json."""
    if stored := config.get("quantization_config"):
        method = stored.get("quant_method", "an unnamed method")
        raise UserError(
            f"{name}: the checkpoint is already quantized ({method}); choose the float checkpoint"
        )


def tokenizer_of(
    where: str, name: str, source: ModelSource, **options: Any
) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a hub id or folder; None for images."""
    if source.objective == "image_classification":
        return None
    try:
        return AutoTokenizer.from_pretrained(where, **options)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{name}: its tokenizer cannot be loaded ({first_line(error)}); a language model needs "
            "tokenizer.json or tokenizer.model next to its weights"
        ) from error
