"""Verification of an export with the library that reads it, where that library is installed."""

import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import CompressedTensorsConfig, GgufConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from qexp.common.errors import UserError, first_line
from qexp.grid.scale import DTYPES
from qexp.models import llama_cpp, rope
from qexp.models.base import AUTO, ready
from qexp.models.exported_run import ExportedRun
from qexp.packed.coded import Coded
from qexp.quantizers.activation import FakeQuant
from qexp.task import TASKS, CausalLM, Task

EQUAL = 1e-6  # largest difference of a logit that counts as none
SEQUENCES, LENGTH = 2, 64


@dataclass(frozen=True)
class Reader:
    """transformers with further packages, by the names of their distributions.

    dtype: in which the model is loaded. kl: the bound on the mean divergence of next-token
    distributions where the reader rounds in its computations; None: logits must be equal.
    """

    packages: tuple[str, ...] = ()
    dtype: str = "float32"
    kl: float | None = None


READERS = {
    "compressed_tensors": Reader(("compressed-tensors",)),
    "gptq": Reader(("gptqmodel", "optimum"), "float16", 1e-4),
    "awq": Reader(("gptqmodel", "optimum"), "float16", 1e-4),
    "nf4": Reader(("bitsandbytes",), kl=1e-2),
    "gguf": Reader(("gguf",)),
    "float": Reader(),
}


def check(
    source: ExportedRun,
    place: Path,
    format: str,
    coded: Mapping[str, Coded],
    section: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The fact that the library computes the run's logits from an export, of random tokens: its
    version and the largest difference, or why it was `skipped`. Static inputs are compared with the
    run's model that rounds them as the library does. section: of config.json.

    The run's model is converted to float32 in place. UserError where the library fails or computes
    another model.
    """
    if (reason := _skipped(source, format, section)) is not None:
        return {"level": 1, "skipped": reason}
    names, expected = _names(format), _expected(source, coded)
    try:
        # GPTQModel compiles its layers, for minutes
        with _quiet(), torch.compiler.set_stance("force_eager"):
            found = _logits(_loaded(source, place, format, section))
    except Exception as error:  # of any kind: it is another library's
        raise UserError(
            f"{names} cannot load the export ({type(error).__name__}: {first_line(error)}); "
            "nothing was written; verify=file writes it without this check"
        ) from error
    reference, static = expected, any(not inputs["dynamic"] for inputs in _inputs(section))
    if static:
        with _rounded_as_readers(source.task):
            reference = _logits(source.model)
    largest, divergence = float((found - reference).abs().max()), _divergence(reference, found)
    bound = READERS[format].kl
    if not (largest <= EQUAL if bound is None else divergence <= bound):
        allowed = "equal logits" if bound is None else f"KL {bound:g}"
        raise UserError(
            f"{names} computes another model from the export (largest difference of a logit "
            f"{largest:.2g}, KL {divergence:.2g}; allowed: {allowed}); nothing was written; "
            "verify=file writes it without this check"
        )
    largest, divergence = float((found - expected).abs().max()), _divergence(expected, found)
    fact = {"level": 1, "library": names, "max_logit": largest, "kl": max(divergence, 0.0)}
    return fact | ({"equal": "static inputs rounded by its formula"} if static else {})


def computing(
    source: ExportedRun, place: Path, format: str, section: Mapping[str, Any] | None
) -> tuple[str, Task]:
    """The software that an export is for, with its version, and the task that it computes from it:
    llama.cpp for GGUF, else transformers. UserError where it cannot."""
    if format == "gguf":
        return llama_cpp.name(), llama_cpp.LlamaCpp(source.task, place)
    if (reason := _skipped(source, format, section)) is not None:
        raise UserError(f"verify=target: {reason}; nothing was written")
    with _quiet():
        model = _loaded(source, place, format, section)
        _logits(model)  # compressed-tensors unpacks weights when the whole model is called
    return _names(format), TASKS[source.task.objective](model, source.tokenizer)


@torch.no_grad()
def divergence(source: ExportedRun, coded: Mapping[str, Coded], task: CausalLM) -> float:
    """The mean KL divergence of a task's distributions from the run's, in nats, of the tokens of
    `check`."""
    hidden = task.hidden(_tokens(source.model)).flatten(0, 1)
    expected = _expected(source, coded).flatten(0, 1)
    return _divergence(expected, torch.cat([*task.logits(hidden)]))


def _expected(source: ExportedRun, coded: Mapping[str, Coded]) -> Float[Tensor, "sequences ..."]:
    return _logits(_float32(source.model, coded))


def _names(format: str) -> str:
    packages = ("transformers", *READERS[format].packages)
    return ", ".join(f"{name} {version(name)}" for name in packages)


def _divergence(
    expected: Float[Tensor, "sequences ..."], found: Float[Tensor, "sequences ..."]
) -> float:
    """The mean KL divergence of the distributions of two tensors of logits, in nats."""
    own, other = expected.log_softmax(-1), found.log_softmax(-1)
    return float((own.exp() * (own - other)).sum(-1).mean())


def _skipped(source: ExportedRun, format: str, section: Mapping[str, Any] | None) -> str | None:
    """Why there is no check."""
    if format not in READERS:
        return "transformers does not read this format"
    for name in READERS[format].packages:
        try:
            version(name)
        except PackageNotFoundError:
            return f"{name} is not installed"
    if source.is_streamed:
        return "it loads models whole, and this one is on disk (model.load=stream)"
    if source.task.objective == "image_classification":
        return "the model reads images"
    if format == "gguf" and rope.factors(source.model.config) is not None:
        return f"transformers ignores {rope.TENSOR}"
    if _asymmetric(section) and (_inputs(section) or len(_groups(section)) > 1):
        return (
            "transformers loads asymmetric weights of compressed-tensors with neither quantized "
            "inputs nor several config groups"
        )
    return None


def _loaded(
    source: ExportedRun, place: Path, format: str, section: Mapping[str, Any] | None
) -> PreTrainedModel:
    where, options = place, {}
    if format == "gguf":
        where, options = place.parent, {"gguf_file": place.name}
        options["quantization_config"] = GgufConfig(dequantize=True)
    elif _asymmetric(section):
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    model = AUTO[source.task.objective].from_pretrained(
        str(where), dtype=DTYPES[READERS[format].dtype], local_files_only=True, **options
    )
    return ready(model)


def _float32(model: PreTrainedModel, coded: Mapping[str, Coded]) -> PreTrainedModel:
    """The model that readers in float32 compute: a run in another dtype has cast its weights."""
    if model.dtype != torch.float32:
        model.float()
        for name, each in coded.items():
            model.get_parameter(f"{name}.weight").data = each.dequantize()
    return model


@torch.no_grad()
def _logits(model: PreTrainedModel) -> Float[Tensor, "sequences ..."]:
    return model(input_ids=_tokens(model)).logits.float()


def _tokens(model: PreTrainedModel) -> Int[Tensor, "sequences length"]:
    config = model.config
    length = min(LENGTH, getattr(config, "max_position_embeddings", LENGTH))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (SEQUENCES, length), generator=generator)
    return tokens.to(model.device)


@contextmanager
def _rounded_as_readers(task: Task) -> Iterator[None]:
    """Static 8-bit inputs by the formula of readers: their zero points are signed, and x / scale +
    zero is another sum of floats than the run's, which a few values in a million round otherwise.
    """

    def hook(quantizer: FakeQuant, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        zero = quantizer.zero - 128
        codes = (args[0].float() / quantizer.scale + zero).clamp(-128, 127).round()
        return ((codes - zero) * quantizer.scale).to(output.dtype)

    handles = [
        quantizer.register_forward_hook(hook)
        for quantizer in task.quantizers.values()
        if isinstance(quantizer, FakeQuant)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _groups(section: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    return [] if section is None else list(section.get("config_groups", {}).values())


def _inputs(section: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    return [group["input_activations"] for group in _groups(section) if group["input_activations"]]


def _asymmetric(section: Mapping[str, Any] | None) -> bool:
    return any(not group["weights"]["symmetric"] for group in _groups(section))


@contextmanager
def _quiet() -> Iterator[None]:
    """No reports, warnings and bars of other libraries, whose failures are reported by `check`."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
