"""Folders of finished runs, written as a run writes them but without running."""

import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

PROTOCOL = "held_out"
DIGEST = "12345678"


def folder(
    top: Path,
    method: str = "gptq",
    bits: int = 3,
    seed: int = 0,
    ppl: float | None = None,
    errors: dict[str, float] | None = None,
    digest: str = DIGEST,
    **fields: Any,
) -> Path:
    """A run of `method`, quantized unless it is `none`; `fields` are keys of the method."""
    name = "-".join([method, *map(str, (bits, seed)), *map(str, fields.values())])
    path = top / name
    (path / ".hydra").mkdir(parents=True)
    quantized = method != "none"
    words = [f"method={method}", f"seed={seed}", *([f"weight.bits={bits}"] if quantized else [])]
    words += [f"method.{key}={value}" for key, value in fields.items()]
    config = {
        "model": {"_target_": "tiny"},
        "method": {"_target_": method, "grid": "${weight}" if quantized else None, **fields},
        "weight": {"bits": bits, "group_size": 64},
        "seed": seed,
        "label": None,
    }
    groups = {"model": "tiny", "data": "text", "method": method, "logger": "csv", "weight": "int"}
    groups |= {"activation": "none", "kv": "none", "transform": "none", "hydra/env": "default"}
    for file, content in (
        ("config", config),
        ("hydra", {"hydra": {"runtime": {"choices": groups}}}),
        ("overrides", words),
    ):
        OmegaConf.save(OmegaConf.create(content), path / ".hydra" / f"{file}.yaml")
    layers = errors if errors is not None else {"model.layers.0.mlp.up_proj": 0.25, "<b>": 0.001}
    lines = "".join(f"{layer},{error}\n" for layer, error in layers.items())
    (path / "layers.csv").write_text(f"name,error\n{lines if quantized else ''}")
    provenance = {
        "finished": "2026-01-01T00:00:00+00:00",
        "protocols": {PROTOCOL: {"digest": digest, "definition": {"length": 512}}},
        "stages": {"quantize": {"seconds": 1.5, "peak_rss_bytes": 2e9}},
        "versions": {"torch": "2.8"},
        "code": "c0de",
    }
    (path / "provenance.json").write_text(json.dumps(provenance))
    metrics = {f"{PROTOCOL}/ppl": 40.0 - bits + seed if ppl is None else ppl}
    metrics |= {f"{PROTOCOL}/ppl_stderr": 0.5} | ({"weight/bits": bits + 0.5} if quantized else {})
    (path / "metrics.json").write_text(json.dumps(metrics))
    return path


def some(top: Path) -> Path:
    """The float model, GPTQ at three bit-widths and a run that failed, in `top`."""
    for bits in (2, 3, 4):
        folder(top, "gptq", bits)
    folder(top, "none")
    failed = folder(top, "gptq", 11)
    (failed / "metrics.json").unlink()
    (failed / "failure.json").write_text('{"reason": "weight.bits=11: is not wanted"}')
    return top


def seeded(top: Path) -> Path:
    """Adds RTN to `some`, and a second seed of both at 3 and 4 bits; GPTQ is better at 3."""
    for bits in (3, 4):
        folder(top, "gptq", bits, seed=1)
        for seed in (0, 1):
            folder(top, "rtn", bits, seed, 40.0 + seed if bits == 3 else None)
    return top
