"""What hub ids, folders and GGUF files have in common: transformers' from_pretrained, checked."""

from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from qexp.errors import UserError
from qexp.models.source import AUTO, DTYPES, Source


def pretrained(where: str, name: str, source: Source, **options: Any) -> PreTrainedModel:
    """The model of a hub id or folder `where`, as it stands there, and whole.

    `name` is the config key and value that errors speak of. transformers fills missing weights
    with random ones and only warns, so a head that was never trained would be measured.
    """
    model, report = AUTO[source.objective].from_pretrained(
        where,
        dtype=DTYPES[source.dtype],
        output_loading_info=True,
        low_cpu_mem_usage=True,
        **options,
    )
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"{name}: the checkpoint has no {missing[0]} ({len(missing)} missing), which "
            f"model.objective={source.objective} needs; choose a checkpoint with it or another "
            "objective"
        )
    return model


def refuse_quantized(config: dict[str, Any], name: str) -> None:
    """UserError for a checkpoint that is stored quantized, from its config.json."""
    if stored := config.get("quantization_config"):
        method = stored.get("quant_method", "an unnamed method")
        raise UserError(
            f"{name}: the checkpoint is already quantized ({method}); choose the float checkpoint"
        )


def tokenizer_of(
    where: str, name: str, source: Source, **options: Any
) -> PreTrainedTokenizerBase | None:
    """Of a hub id or folder; None for images."""
    if source.objective == "image_classification":
        return None
    try:
        return AutoTokenizer.from_pretrained(where, **options)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{name}: its tokenizer cannot be loaded ({first_line(error)}); a language model needs "
            "tokenizer.json or tokenizer.model beside its weights"
        ) from error


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
