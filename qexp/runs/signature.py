"""What makes two runs the same run."""

import hashlib
import json
from typing import Any

from omegaconf import DictConfig, OmegaConf

# what is shown, kept or waited for; none of it can change a number
KEPT = ("hydra", "logger", "progress", "threads", "save_weights", "optimize", "label")
UNSIGNED = frozenset({*KEPT, "dry_run", "retry", "fail_fast", "paper"})


def signed(cfg: DictConfig) -> dict[str, Any]:
    """The resolved part of a configuration that can change a number."""
    content: dict[str, Any] = {}
    for key in cfg:
        if key not in UNSIGNED:
            value = cfg[key]  # key by key: the Hydra node asks for this very signature
            content[str(key)] = (
                class_names(OmegaConf.to_container(value, resolve=True, throw_on_missing=True))
                if OmegaConf.is_config(value)
                else value
            )
    return content


def class_names(tree: Any) -> Any:
    """A configuration whose `_target_`s are names of classes without their modules.

    A run is what it computes, not where its class is: a move renames no run.
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
    text = json.dumps(signed(cfg), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
