"""OmegaConf resolvers: functions that yaml files can call.

`${sig:}` is the signature of the configuration that contains it; `${run_config:FOLDER,KEY}` is the
value of a key in the configuration of a finished run.
"""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from qexp.runs import results
from qexp.runs.signature import signature


def register() -> None:
    """Register the resolvers with OmegaConf; may be called repeatedly."""
    OmegaConf.register_new_resolver("sig", _sig, replace=True)
    OmegaConf.register_new_resolver("run_config", _run_config, replace=True)


def _sig(*, _root_: DictConfig) -> str:
    return signature(_root_)


def _run_config(folder: str | None, key: str) -> Any:
    return results.config(folder)[key]
