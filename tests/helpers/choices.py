"""The choices that conf/ offers, listed from its folders."""

import contextlib

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
    for path in sorted((CONF / top).glob("[!_]*.yaml")):
        with contextlib.suppress(HydraException):
            compose("config", [f"{top}={path.stem}", f"{group}={choice}"])
            return [f"{top}={path.stem}", f"{group}={choice}"]
    raise AssertionError(f"no choice of {top} has a place for {group}")
