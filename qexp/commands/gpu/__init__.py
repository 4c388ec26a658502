"""Checks and costs on one accelerator: a JSON file and a Markdown page."""

import argparse
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from qexp.commands.bench.sizes import Sizes
from qexp.commands.gpu.page import page
from qexp.commands.gpu.solving import replayed, solving
from qexp.commands.gpu.suite import suite
from qexp.commands.gpu.training import distributed, evaluation, training
from qexp.common import numerics
from qexp.common.errors import UserError, first_line
from qexp.common.files import atomic
from qexp.runs import resolvers
from qexp.runs.provenance import Provenance
from qexp.runs.results import write_json

log = logging.getLogger(__name__)

# In the order of what a page needs first: a part that the time does not reach is left out.
PARTS = {
    "tests": suite,
    "solving": solving,
    "replay": replayed,
    "training": training,
    "distributed": distributed,
    "evaluation": evaluation,
}
REAL = ("cuda", "xpu", "mps", "hpu")  # other accelerators are simulations


def main(arguments: Sequence[str]) -> int:
    """The command line of `qexp gpu`: 1 if a part failed, else 0. Raises UserError without an
    accelerator."""
    chosen = _parsed(arguments)
    device = numerics.device_of(chosen.device)
    if device.type == "cpu":
        raise UserError(f"--device {chosen.device}: there is no accelerator here; name one")
    resolvers.register()
    sizes = Sizes(**{each.name: getattr(chosen, each.name) for each in fields(Sizes)})
    names = chosen.parts.split(",")
    for name in names:
        if name not in PARTS:
            raise UserError(f"--parts {name}: is unknown; give some of {', '.join(PARTS)}")
    parts, start = {}, time.monotonic()
    for name in names:
        if time.monotonic() - start > 60 * chosen.minutes:
            parts[name] = {"left out": f"{chosen.minutes} minutes were over"}
            continue
        print(f"{name} …", flush=True)
        parts[name] = _measured(name, sizes, str(device))
    result = record(device, sizes, parts, time.monotonic() - start)
    write_json(chosen.out / "gpu.json", result)
    with atomic(chosen.out / "gpu.md") as path:
        path.write_text(page(result), encoding="utf-8")
    print(chosen.out / "gpu.md")
    return int(_failed(parts))


def record(
    device: torch.device, sizes: Sizes, parts: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """What the JSON file says. Of a simulated device no times and no bytes."""
    known = Provenance().dict()
    simulated = device.type not in REAL
    kept = ("git", "python", "versions", "machine", "threads", "started")
    content = {
        "device": str(device),
        "simulated": simulated,
        "numerics": numerics.facts(device),
        "sizes": asdict(sizes),
        **{key: known[key] for key in kept},
        "parts": without_speeds(parts) if simulated else parts,
    }
    return content if simulated else content | {"seconds": seconds}


def without_speeds(tree: Any) -> Any:
    """A JSON tree without what a simulation cannot measure."""
    if not isinstance(tree, dict):
        return tree
    words = ("seconds", "bytes", "per second", "share", "rate")
    return {
        key: without_speeds(value)
        for key, value in tree.items()
        if not any(key.endswith(word) for word in words)
    }


def _failed(tree: Any) -> bool:
    return isinstance(tree, dict) and ("failed" in tree or any(map(_failed, tree.values())))


def _measured(name: str, sizes: Sizes, device: str) -> dict[str, Any]:
    """The numbers of a part, or why it failed: the others are measured all the same."""
    try:
        return PARTS[name](sizes, device)
    except Exception as error:
        log.exception("%s", name)
        return {"failed": f"{type(error).__name__}: {first_line(error)}"}
    finally:
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="qexp gpu", description=__doc__)
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N …")
    parser.add_argument("--parts", default=",".join(PARTS), help="by commas; all by default")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no part begins")
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu"), help="the folder")
    for each in fields(Sizes):
        words = f"--{each.name.replace('_', '-')}"
        parser.add_argument(words, type=int, default=each.default, help=each.metadata["help"])
    return parser.parse_args(arguments)
