"""The choices that conf/ offers, listed from its folders."""

from itertools import zip_longest

from qexp.config import location

CONF = location.conf()

# For each nested group a choice of its top group that has a place for it.
PARENTS = {
    "activation/grid/range": "activation=int4_token",
    "activation/placement": "activation=int4_token",
    "method/adapter": "method=bitdistiller",
    "method/clamp": "method=bitdistiller",
    "method/hessian": "method=billm",
    "method/loss": "method=bitdistiller",
    "method/metric": "method=allocated",
    "method/penalty": "method=bitdistiller",
    "method/residual": "method=adpq",
    "method/rounding": "method=bitdistiller",
    "method/rule": "method=allocated",
    "method/scale": "method=bitdistiller",
    "method/schedule": "method=jacob",
    "method/target": "method=billm",
    "method/trained": "method=bitdistiller",
    "weight/range": "weight=channel",
}
QUANTIZERS = ("activation", "kv", "transform", "weight")  # a method may choose them


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
    """The choice, for a nested group with a parent that takes it."""
    top, _, nested = group.partition("/")
    if not nested or top == "hydra":
        return [f"{group}={choice}"]
    if top == "experiment":  # a folder of experiments is no group of its own
        return [f"{top}={nested}/{choice}"]
    return [PARENTS[group], f"{group}={choice}"]


def together() -> list[list[str]]:
    """Overrides that compose every choice at least once, one of each independent group at a time.

    Independent are groups below the same choice, groups that no choice of another selects, and the
    four quantizers, which methods select. Experiments and searches select any group and are alone.
    """
    sets: dict[str, dict[str, list[str]]] = {}
    alone = []
    for choice in choices():
        group, _, name = choice.partition("=")
        if group.startswith(("experiment", "search")):
            alone.append(holder(group, name))
            continue
        place = PARENTS.get(group, "quantizers" if group in QUANTIZERS else "other")
        sets.setdefault(place, {}).setdefault(group, []).append(choice)
    return alone + [
        [*([place] if "=" in place else []), *(each for each in row if each is not None)]
        for place, groups in sets.items()
        for row in zip_longest(*groups.values())
    ]
