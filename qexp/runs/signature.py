"""Signature of a run: a hash of the part of its configuration that can change a result."""

import hashlib
import json
from dataclasses import asdict
from typing import Any

from omegaconf import DictConfig, OmegaConf

from qexp.common.numerics import Numerics

# display, storage and scheduling: none of these keys can change a result
WORDS = ("label", "kind")  # of the user; reports show them
KEPT = ("hydra", "logger", "progress", "threads", "save_weights", "optimize", "replay", *WORDS)
UNSIGNED = frozenset({*KEPT, "dry_run", "retry", "fail_fast", "table", "records", "memory"})


def signed(cfg: DictConfig) -> dict[str, Any]:
    """The part of a configuration that can change a result, resolved."""
    content: dict[str, Any] = {}
    for key in cfg:
        if key not in UNSIGNED:
            value = cfg[key]  # key by key: the node `hydra` interpolates this signature
            content[str(key)] = (
                class_names(OmegaConf.to_container(value, resolve=True, throw_on_missing=True))
                if OmegaConf.is_config(value)
                else value
            )
    if isinstance(model := content.get("model"), dict):
        model.pop("load", None)  # where the weights are kept
    return without_defaults(content)


def without_defaults(tree: dict[str, Any]) -> dict[str, Any]:
    """A configuration without the `numerics` that have their default: older runs have no such key,
    and are the same runs."""
    node = tree.get("numerics")
    if not isinstance(node, dict):
        return tree
    defaults = asdict(Numerics())
    changed = {key: value for key, value in node.items() if value != defaults.get(key)}
    rest = {key: value for key, value in tree.items() if key != "numerics"}
    return rest | ({"numerics": changed} if changed else {})


def class_names(tree: Any) -> Any:
    """A configuration in which each `_target_` is a class name without its module.

    Moving a class to another module must not change the signature.
    """
    if isinstance(tree, list):
        return [class_names(each) for each in tree]
    if not isinstance(tree, dict):
        return tree
    return {
        key: str(value).rpartition(".")[2] if key == "_target_" else class_names(value)
        for key, value in tree.items()
    }


def signature(cfg: DictConfig) -> str:
    """Eight hex digits of the configuration: the name of the run's folder."""
    return short_hash(signed(cfg))


def short_hash(content: Any) -> str:
    """Eight hex digits of a JSON tree."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
