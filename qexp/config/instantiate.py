"""Instantiation of the object that a config node names."""

import inspect
import pydoc
from types import SimpleNamespace
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate as hydra_instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

from qexp.common.errors import FieldError, UserError, check_bool


def instantiate(node: Any, **fields: Any) -> Any:
    """The object of a node with a `_target_`; `fields` are passed in addition to the node's keys.

    Every object of the project is created here, so that Hydra's rules for instantiation (1.4
    requires a whitelist) are followed in one place. An exception of the constructor (UserError, or
    ValueError or TypeError about a field) becomes a UserError that names the config key.
    """
    known = OmegaConf.is_config(node)
    _check(node if known else OmegaConf.create(node, flags={"allow_objects": True}))
    try:
        return hydra_instantiate(node, _convert_="all", **fields)
    except InstantiationException as error:
        cause: BaseException | None = error
        while isinstance(cause, InstantiationException):  # each level of nesting wraps it once more
            cause = cause.__cause__
        if isinstance(cause, UserError):
            raise cause from error
        if isinstance(cause, ValueError | TypeError):
            key = str(error).rpartition("full_key: ")[2] if "full_key: " in str(error) else "config"
            separator = "." if isinstance(cause, FieldError) else ": "
            raise UserError(f"{key}{separator}{cause}") from error
        raise


def _check(node: DictConfig | ListConfig) -> None:
    """UserError where a parameter of one of the project's targets, in the node or below it, is
    annotated bool and given something else: Python would take any word for true."""
    keys: Any = range(len(node)) if isinstance(node, ListConfig) else list(node)
    given = [key for key in keys if not OmegaConf.is_missing(node, key)]
    if "_target_" in given and str(node._target_).startswith("qexp."):
        kinds = _kinds(node._target_)
        settable = [key for key in given if kinds.get(key) == bool | None and node[key] is not None]
        certain = [key for key in given if kinds.get(key) is bool]
        where = node._get_full_key("_target_").rpartition(".")[0]
        # The node itself would give its method for a key such as `update`.
        values = SimpleNamespace(**{key: node[key] for key in (*certain, *settable)})
        check_bool(where, values, *certain, *settable)
    for key in given:
        if OmegaConf.is_config(node[key]):
            _check(node[key])


def _kinds(target: str) -> dict[str, Any]:
    """The annotation of each parameter; none for what cannot be imported, of which Hydra tells."""
    try:
        found: Any = pydoc.locate(target)
    except pydoc.ErrorDuringImport:
        found = None
    if not callable(found):
        return {}
    parameters = inspect.signature(found, eval_str=True).parameters
    return {name: each.annotation for name, each in parameters.items()}
