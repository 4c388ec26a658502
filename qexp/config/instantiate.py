"""From a config node to the object that it names."""

from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate as hydra_instantiate

from qexp.common.errors import FieldError, UserError


def instantiate(node: Any, **fields: Any) -> Any:
    """The object of a node with a `_target_`; `fields` are handed to it beside the node's own.

    Every object of the project is built here, so that Hydra's rules for instantiation (1.4 wants a
    whitelist) are met in one place. What an object refuses in its constructor (UserError, or a
    ValueError or TypeError about its fields) arrives as a UserError that names the config key.
    """
    try:
        return hydra_instantiate(node, _convert_="all", **fields)
    except InstantiationException as error:
        cause: BaseException | None = error
        while isinstance(cause, InstantiationException):  # nested nodes wrap once a level
            cause = cause.__cause__
        if isinstance(cause, UserError):
            raise cause from error
        if isinstance(cause, ValueError | TypeError):
            key = str(error).rpartition("full_key: ")[2] if "full_key: " in str(error) else "config"
            between = "." if isinstance(cause, FieldError) else ": "
            raise UserError(f"{key}{between}{cause}") from error
        raise
