"""What went wrong while a configuration was put together, in one sentence."""

import difflib
import re
from collections.abc import Iterable

from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

CompositionError = HydraException | OmegaConfBaseException
# groups that leave no key of their own in a configuration
WITHOUT_KEY = ("experiment", "search", "local")


def nearest(name: str, names: Iterable[str]) -> str:
    """What was probably meant, else what there is to choose from."""
    names = sorted(set(names))
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]}?"
    return f"choose from {', '.join(names)}" if names else "there is nothing to choose from"


def message_for(error: CompositionError) -> str:
    """The configuration key or choice that is wrong, and the nearest one that is right."""
    raised = re.match(r"UserError raised while resolving interpolation: (.*)", str(error))
    if raised is not None:  # a resolver's own sentence; OmegaConf keeps the text alone
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
    said = str(error) or str(error.__cause__ or type(error).__name__)
    return " ".join(line.strip() for line in said.splitlines() if line.strip())


def missing_plugin(error: BaseException) -> str | None:
    """The sentence for a launcher or sweeper that is not installed."""
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
        own = [str(name) for name in parent if not str(name).startswith("_")]
        if above and not own:
            return f"{full}: there is no such key; what was chosen for {above} has no settings"
        names = [f"{above}.{name}" if above else name for name in own]
        if not above:
            names = [name for name in names if name != "hydra"] + list(WITHOUT_KEY)
    return f"{full}: there is no such key; {nearest(full, names)}"
