"""What a yaml file may compute.

`${sig:}` is the signature of the configuration it stands in; `${run_config:FOLDER,KEY}` what the
configuration of a finished run says under a key.
"""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from qexp.runs import results
from qexp.runs.signature import signature


def register() -> None:
    """Make the resolvers known to OmegaConf; calling it again changes nothing."""
    OmegaConf.register_new_resolver("sig", _sig, replace=True)
    OmegaConf.register_new_resolver("run_config", _run_config, replace=True)


def _sig(*, _root_: DictConfig) -> str:
    return signature(_root_)


def _run_config(folder: str | None, key: str) -> Any:
    return results.config(folder)[key]
