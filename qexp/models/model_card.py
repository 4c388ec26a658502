"""Model card of an exported folder, and what is to be known about each format."""

from collections.abc import Mapping
from typing import Any

from qexp.models.exported_run import ExportedRun
from qexp.packed.coded import Coded

LOAD = {
    "compressed_tensors": """\
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
model = AutoModelForCausalLM.from_pretrained("{folder}"{options})
""",
    "gptq": """\
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{folder}", dtype="float16")  # with gptqmodel, optimum
""",
    "awq": """\
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{folder}", dtype="float16")  # needs gptqmodel
""",
    "mlx": """\
import mlx_lm
model, tokenizer = mlx_lm.load("{folder}")
""",
    "nf4": """\
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{folder}")  # needs bitsandbytes
""",
    "float": """\
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{folder}")
""",
}
DEQUANTIZE = ", quantization_config=CompressedTensorsConfig(dequantize=True)"
TAGS = {"compressed_tensors": "compressed-tensors"}


def note(format: str, coded: Mapping[str, Coded]) -> str:
    """A condition under which readers load these matrices; empty where there is none."""
    asymmetric = any(each.grid.has_zero for each in coded.values())
    if not asymmetric:
        return ""
    return {
        "compressed_tensors": "transformers 5.23 loads asymmetric weights with "
        "CompressedTensorsConfig(dequantize=True)",
        "gptq": "version 2 of the format, since weights are asymmetric; vLLM loads symmetric ones",
    }.get(format, "")


def exactness(format: str) -> str:
    """What of the stored model is not computed exactly by readers, and why."""
    return {
        "compressed_tensors": "Scales are float32, so that readers that multiply in float32 get "
        "the run's values bit for bit.",
        "gptq": "Codes and scales are the run's. Readers compute in float16.",
        "awq": "Codes and scales are the run's. Readers compute in float16.",
        "mlx": "Codes and scales are the run's. Readers compute scale · code + bias, which differs "
        "from scale · (code - zero) in the last bits of float32.",
        "nf4": "Codes and scales are the run's. On some CPUs bitsandbytes computes in bfloat16.",
    }.get(format, "Weights are the run's values, bit for bit.")


def text(source: ExportedRun, facts: Mapping[str, Any], coded: Mapping[str, Coded]) -> str:
    """README.md of a folder."""
    format, overrides = facts["format"], source.overrides()
    words = dict(word.split("=", 1) for word in overrides if "=" in word)
    method = words.get("method", source.cfg.method._target_.rpartition(".")[2])
    head = [
        "---",
        *([f"base_model: {source.cfg.model.id}"] if "id" in source.cfg.model else []),
        "library_name: transformers",
        "tags:",
        *(f"- {tag}" for tag in ("qexp", *_tags(format, method, coded))),
        "quantized_by: qexp",
        "---",
    ]
    rows = [("method", method), ("format", format), ("dtype of float tensors", facts["dtype"])]
    if coded:
        rows.append(("grid", _grid(next(iter(coded.values())))))
        rows.append(("bits per weight, this folder", f"{facts['bits']:.3f}"))
        rows.append(("bits per weight, the run", f"{facts['run_bits']:.3f}"))
    numbers = [
        f"| {name} | {value:.6g} | {_of(facts, name)} |"
        for name, value in facts["metrics"].items()
        if name.endswith("/ppl")
    ]
    lines = [
        *head,
        "",
        f"# Quantized by qexp: {method}",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in rows),
        "",
        "Every matrix of this folder was read back and equals that of the run.",
        *(
            f"Loaded by {fact['library']}: largest difference of a logit {fact['max_logit']:.2g}."
            for fact in facts["verified"]
            if "max_logit" in fact
        ),
        *(
            f"The last column is computed by {fact['library']}."
            for fact in facts["verified"]
            if fact["level"] == 3
        ),
        *(["", "| metric | run | this folder |", "|---|---|---|", *numbers] if numbers else []),
        "",
        *(f"Protocol {name}: digest `{digest}`." for name, digest in facts["protocols"].items()),
        "",
        "## Use",
        "",
        "```python",
        LOAD[format].format(folder=".", options=DEQUANTIZE if note(format, coded) else "").rstrip(),
        "```",
        *(["", f"Condition: {note(format, coded)}."] if note(format, coded) else []),
        "",
        f"{exactness(format)}",
        "",
        "## The run",
        "",
        "```",
        f"qexp {' '.join(overrides)}".rstrip(),
        "```",
        "",
        f"Signature {facts['run']}, revision {facts['revision']}.",
    ]
    return "\n".join(lines) + "\n"


def _tags(format: str, method: str, coded: Mapping[str, Coded]) -> list[str]:
    bits = sorted({each.grid.bits for each in coded.values()})
    named = [TAGS.get(format, format)] if coded else []
    return [method, *(f"{each}-bit" for each in bits), *named]


def _grid(coded: Coded) -> str:
    size = coded.grid.group_size
    span = "one scale a row" if size is None else f"groups of {size}"
    kind = "asymmetric" if coded.grid.has_zero else "symmetric"
    return f"{coded.grid.bits} bits, {span}, {kind}"


def _of(facts: Mapping[str, Any], name: str) -> str:
    measured = facts.get("computed", facts.get("measured", {}))
    return f"{measured[name]:.6g}" if name in measured else "not measured"
