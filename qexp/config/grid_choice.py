"""The choice `weight=built_in`, for methods that read no grid because they define their values."""

from typing import Any, NoReturn

from omegaconf import DictConfig, OmegaConf

from qexp.common.errors import UserError

BUILT_IN = {"_target_": "qexp.config.grid_choice.no_grid"}


def no_grid() -> NoReturn:
    """The target of `weight=built_in`. Raises UserError: the caller needs a grid."""
    raise UserError("weight=built_in: a grid is needed here; choose one, for example weight=int.")


def check(cfg: DictConfig) -> None:
    """UserError where a grid was chosen that nothing reads: two such choices would be two runs with
    the same result."""
    weight = OmegaConf.to_container(cfg.weight, resolve=True)
    steps = [OmegaConf.to_container(cfg[key], resolve=True) for key in ("method", "transform")]
    if "solver" not in cfg.method or weight == BUILT_IN or _holds(steps, weight):
        return
    solver = cfg.method.solver._target_.rpartition(".")[2]
    raise UserError(
        f"weight: {solver} defines its own values and reads no grid; leave out weight=… and "
        "weight.…=…; a yaml of its own overrides /weight@_global_.weight with built_in"
    )


def _holds(node: Any, part: Any) -> bool:
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return node == part or any(_holds(child, part) for child in children)
