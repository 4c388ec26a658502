"""The best value of a key that was searched over, and whether it lies at an end of its grid."""

import json
import math
from collections.abc import Sequence

from qexp.common.errors import UserError
from qexp.report.pivot import Setting, Table
from qexp.runs.finished import Column


def chosen(table: Table, key: str) -> list[str]:
    """A sentence for each metric and each setting that is the same but for `key`.

    Raises UserError where no number of that key varies.
    """
    groups: dict[str, list[Setting]] = {}
    for setting in table.settings:
        if type(setting.run.leaves.get(key)) not in (int, float):
            continue
        rest = {k: v for k, v in setting.run.leaves.items() if k not in (key, *setting.over)}
        groups.setdefault(json.dumps(rest, sort_keys=True, default=str), []).append(setting)
    searched = [members for members in groups.values() if len(members) > 1]
    if not searched:
        raise UserError(f"--chosen {key}: no setting has several numbers of it; sweep it with -m")
    rows = [row for row in table.row_keys if row != key]
    return [
        sentence(members, key, column, " ".join(members[0].words(rows).values()))
        for column in table.columns
        if column.is_perplexity or column.higher
        for members in searched
    ]


def sentence(settings: Sequence[Setting], key: str, column: Column, name: str) -> str:
    """Which value of `key` is best. Beyond an end of the grid the metric may be better still."""
    found = {float(s.run.leaves[key]): s.spread(column).mean for s in settings}
    known = {value: mean for value, mean in found.items() if not math.isnan(mean)}
    name = f"{column.title}, {name}: {key}"
    if len(known) < 2:
        return f"{name} was measured at fewer than two values"
    best = (max if column.higher else min)(known, key=lambda value: known[value])
    grid = f"of {len(known)} from {min(known):g} to {max(known):g}"
    text = f"{name}={best:g} is best {grid}"
    if best in (min(known), max(known)):
        return f"WARNING: {text}, at the end of its grid: widen the grid beyond {best:g}"
    return text
