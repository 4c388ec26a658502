"""Classes that a run uses, by which its code is known: those that its configuration names."""

from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from qexp.common.modules import PIPELINE
from qexp.runs import results

BUILT = ("model", "calibration", "transform", "method", "eval")  # what `pipeline.build` reads
FROM_RUN = "qexp.models.from_run.FromRun"  # builds the model and the quantizers of another run


def roots(cfg: DictConfig) -> list[str]:
    """The pipeline and each `_target_` that a run of the configuration instantiates, sorted."""
    return sorted({PIPELINE, *(name for key in BUILT for name in _targets(_resolved(cfg, key)))})


def _resolved(cfg: DictConfig, key: str) -> Any:
    node = cfg.get(key)
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else None


def _targets(tree: Any) -> Iterator[str]:
    if isinstance(tree, list):
        for each in tree:
            yield from _targets(each)
    elif isinstance(tree, dict):
        if "_target_" in tree:
            yield str(tree["_target_"])
        if tree.get("_target_") == FROM_RUN:
            other = results.config(tree["folder"])
            for key in ("model", "method"):
                yield from _targets(_resolved(other, key))
        for value in tree.values():
            yield from _targets(value)
