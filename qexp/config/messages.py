"""One-sentence messages for errors in composing a configuration."""

import difflib
import re
from collections.abc import Iterable

from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

CompositionError = HydraException | OmegaConfBaseException
# groups whose choice adds no key of that name to a configuration
WITHOUT_KEY = ("experiment", "search", "local")


def nearest(name: str, names: Iterable[str]) -> str:
    """A suggestion: the most similar name, else all names."""
    names = sorted(set(names))
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]}?"
    return f"choose from {', '.join(names)}" if names else "there is nothing to choose from"


def message_for(error: CompositionError) -> str:
    """One sentence: the key or choice that is wrong, and the nearest valid one."""
    raised = re.match(r"UserError raised while resolving interpolation: (.*)", str(error))
    if raised is not None:  # the UserError of a resolver, of which OmegaConf keeps only the text
        return raised[1]
    if isinstance(error, OmegaConfBaseException) and "Missing mandatory value" in str(error):
        keys = [*re.findall(r"full_key: (\S+)", str(error)), error.full_key]
        return f"{keys[0]}: has no value; set it with {keys[0]}=VALUE"
    variable = re.search(r"Environment variable '(\w+)' not found", str(error))
    if variable is not None:
        keys = [*re.findall(r"full_key: (\S+)", str(error)), "config"]
        return f"{keys[0]}: set the environment variable {variable[1]}, or this key"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file is not None:
        return _choice(error.missing_cfg_file, error.options or [])
    if isinstance(error, ConfigCompositionException):
        cause = error.__cause__
        if isinstance(cause, ConfigAttributeError | ConfigKeyError):
            return _key(cause)
        several = re.match(
            r"Ambiguous value for argument '(.*)'|Sweep parameters '(.*)'", str(error)
        )
        if several is not None:
            return f"{several[1] or several[2]}: several values need -m (one run for each)"
    message = str(error) or str(error.__cause__ or type(error).__name__)
    return " ".join(line.strip() for line in message.splitlines() if line.strip())


def missing_plugin(error: BaseException) -> str | None:
    """The message for a launcher or sweeper that is not installed; None for any other error."""
    unknown = re.search(r"hydra_plugins\.hydra_(\w+)_(launcher|sweeper)\b", str(error))
    if unknown is None or "plugin class" not in str(error):
        return None
    extra = "optuna" if unknown[1] == "optuna" else "launchers"
    return f"hydra/{unknown[2]}: {unknown[1]} is not installed; pip install 'qexp[{extra}]'"


def _choice(path: str, options: Iterable[str]) -> str:
    group, _, choice = path.rpartition("/")
    return f"{group}={choice}: there is no such choice; {nearest(choice, options)}"


def _key(error: OmegaConfBaseException) -> str:
    parent = error.parent_node
    full = str(error.full_key or error.key)
    above = full.rpartition(".")[0]
    names: list[str] = []
    if parent is not None and OmegaConf.is_dict(parent):
        keys = [str(key) for key in parent if not str(key).startswith("_")]
        if above and not keys:
            return f"{full}: there is no such key; the choice for {above} has no settings"
        names = [f"{above}.{key}" if above else key for key in keys]
        if not above:
            names = [name for name in names if name != "hydra"] + list(WITHOUT_KEY)
    return f"{full}: there is no such key; {nearest(full, names)}"
