"""The choices that conf/ offers, listed from its folders."""

import contextlib
import functools

from hydra import compose
from hydra.errors import HydraException

from qexp.config import location

CONF = location.conf()


def choices() -> list[str]:
    """`group=choice` of every yaml; the group is the folder."""
    found = []
    for path in sorted(CONF.rglob("[!_]*.yaml")):  # _NAME is shared by others and no choice
        group = path.parent.relative_to(CONF).as_posix()
        # from_run needs a finished run, see test_pipeline
        if group not in (".", "local") and path.stem != "from_run":
            found.append(f"{group}={path.stem}")
    return found


def holder(group: str, choice: str) -> list[str]:
    """The choice, for a nested group with the first of its parents that takes it."""
    top, _, nested = group.partition("/")
    if not nested or top == "hydra":
        return [f"{group}={choice}"]
    if top == "experiment":  # a folder of experiments is no group of its own
        return [f"{top}={nested}/{choice}"]
    return [f"{top}={_parent(group)}", f"{group}={choice}"]


@functools.cache
def _parent(group: str) -> str:
    """The first choice of the top group that takes the nested one; trying takes seconds."""
    top = group.partition("/")[0]
    choice = min(path.stem for path in (CONF / group).glob("[!_]*.yaml"))
    for path in sorted((CONF / top).glob("[!_]*.yaml")):
        with contextlib.suppress(HydraException):
            compose("config", [f"{top}={path.stem}", f"{group}={choice}"])
            return path.stem
    raise AssertionError(f"no choice of {top} has a place for {group}")
