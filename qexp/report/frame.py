"""Finished runs as a table of pandas, one row per run."""

from collections.abc import Sequence
from typing import Any

import pandas

from qexp.report.pivot import SEED, differing, group
from qexp.runs.finished import Run

ALWAYS = ("model", "method", "weight.bits")


def frame(runs: Sequence[Run], keys: Sequence[str] | None = None) -> pandas.DataFrame:
    """The table that `qexp.api.runs` describes."""
    if keys is None:
        keys = list(dict.fromkeys([*ALWAYS, *differing(group(runs)), *SEED]))
    digests: dict[str, set[str]] = {}
    for run in runs:
        for name in run.metrics:
            digests.setdefault(name, set()).add(digest(run, name))
    several = {name for name, found in digests.items() if len(found) > 1}
    rows = []
    for run in runs:
        row: dict[str, Any] = {"folder": str(run.folder)}
        row |= {key: run.setting(key) for key in keys}
        row["seconds"] = run.seconds
        for name, value in run.metrics.items():
            heading = f"{name} [{digest(run, name)}]" if name in several else name
            row[heading] = value
        rows.append(row)
    columns = dict.fromkeys(["folder", *keys, "seconds", *(key for row in rows for key in row)])
    return pandas.DataFrame(rows, columns=list(columns))


def digest(run: Run, metric: str) -> str:
    """The digest of the protocol of a metric; empty where none was recorded."""
    protocols = run.provenance.get("protocols", {})
    parts = metric.split("/")
    for stop in range(len(parts) - 1, 0, -1):
        if (protocol := protocols.get("/".join(parts[:stop]))) is not None:
            return str(protocol.get("digest", ""))
    return ""
