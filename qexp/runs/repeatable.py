"""Differences between two machines that may change the last digits of a run."""

import logging
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig

from qexp.common import numerics
from qexp.runs import results
from qexp.runs.provenance import processor

log = logging.getLogger(__name__)


class Difference(NamedTuple):
    """One fact in which two machines differ."""

    name: str
    there: str
    here: str


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[Difference]:
    """Of two provenances; empty where the one machine is expected to repeat the other's digits.
    What one of them does not record is not compared."""
    one, other = _facts(there), _facts(here)
    found = {key: (one[key], other[key]) for key in one if key in other and one[key] != other[key]}
    if "device" in found:  # their models and threads differ then too
        found = {key: pair for key, pair in found.items() if key not in ("model", "threads")}
    return [Difference(key, str(a), str(b)) for key, (a, b) in found.items()]


def expected(cfg: DictConfig) -> dict[str, Any]:
    """What the provenance of a run of this configuration would say on this machine, as far as it
    differs between machines and is known before the run."""
    device, settings = numerics.device_of(cfg.device), numerics.of(cfg)
    return {
        "device": str(device),
        "numerics": {
            **vars(settings),
            "device": numerics.model_of(device),
            "cublas_workspace": settings.workspace,
        },
        "machine": {"processor": processor()},
        "versions": {"torch": metadata.version("torch")},
    }


def report(cfg: DictConfig, folder: Path) -> None:
    """Log what differs on this machine from the one that a finished run was made on, if anything
    does."""
    if found := differences(results.provenance(folder), expected(cfg)):
        log.info("%s was made elsewhere, last digits may differ: %s", folder.name, sentence(found))


def sentence(found: Sequence[Difference]) -> str:
    """The differences with their values."""
    return "; ".join(f"{each.name} {each.there}, here {each.here}" for each in found)


def _facts(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that is known to change last digits, by name. Runs of older versions, which were
    all made on CPUs, do not record `numerics`."""
    kind = str(provenance.get("device", "cpu")).partition(":")[0]
    set_to = dict(provenance.get("numerics", {}))
    model = set_to.pop("device", None)
    if kind == "cpu":
        model = provenance.get("machine", {}).get("processor")
    facts = {"device": kind, "model": model, "torch": provenance.get("versions", {}).get("torch")}
    if kind == "cpu":
        facts["threads"] = provenance.get("threads")
    facts |= {f"numerics.{key}": value for key, value in set_to.items()}
    return {key: value for key, value in facts.items() if value is not None}
