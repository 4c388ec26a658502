"""Data of the report page: quantities, settings, lines of the plot, runs and layer errors."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qexp.report import heatmap, origin, plots
from qexp.report.pivot import Setting, Table, differing, names
from qexp.runs.finished import Column, Run

COSTS = {"weight/bits": "bits per weight, measured", "seconds": "seconds", "memory": "memory, GB"}
COSTS |= {"cuda": "cuda memory, GB"}
UNEVEN = 0.25  # stored bits by which linears must differ to get a map


@dataclass(frozen=True)
class Quantity:
    """A number that every setting may have: a metric, a cost, or a key of the configuration."""

    name: str
    label: str
    column: Column | None = None

    @property
    def is_cost(self) -> bool:
        """Whether less of it is better, whatever the metric."""
        return self.name in COSTS

    def values(self, setting: Setting) -> Any:
        """The number; of a metric its mean, the deviation over seeds and the standard error."""
        if self.column is not None:
            spread = setting.spread(self.column)
            return [*map(_number, (spread.mean, spread.deviation, setting.error(self.column)))]
        if self.name == "seconds":
            return _number(setting.seconds)
        if self.name in ("memory", "cuda"):
            return _number(setting.peak("rss" if self.name == "memory" else "cuda"))
        return _number(setting.value(self.name))

    def content(self) -> dict[str, Any]:
        """What the page needs to know of it."""
        content: dict[str, Any] = {"name": self.name, "label": self.label, "cost": self.is_cost}
        content |= {"measured": self.is_cost, "log": False, "of": "", "higher": None}
        if self.is_cost:
            content["higher"] = False
        if self.column is not None:
            protocol, digest = self.column.name.rpartition("/")[0], self.column.digest
            content["of"] = f"{protocol} [{digest}]" if digest else protocol
            content |= {"measured": True, "log": self.column.is_perplexity}
            content["higher"] = self.column.higher
        return content


def content(table: Table, numbers: Mapping[int, int], x: str) -> dict[str, Any]:
    """Everything that the page draws, as JSON knows it.

    `numbers`: by the id of a setting. `x`: the quantity on the x axis at first.
    """
    settings, keys = table.settings, differing(table.settings)
    places = {id(setting): at for at, setting in enumerate(settings)}
    quantities, values = _quantities(table, _numeric(settings, keys), x)
    known = [quantity.name for quantity in quantities]
    first = next((q for q in quantities if q.column and q.column.is_perplexity), None)
    first = first or next((q for q in quantities if q.column), quantities[0])
    panels = list(dict.fromkeys(map(plots.subject, settings)))
    layers, errors = _layers(settings)
    described = []
    for at, setting in enumerate(settings):
        words = [word for word in setting.words(keys or ["method"]).values() if word != "none"]
        described.append(
            {
                "number": numbers[id(setting)],
                "words": ", ".join(words) or "none",
                "panel": panels.index(plots.subject(setting)),
                "float": setting.run.is_float,
                "count": len(setting.runs),
                "values": values[at],
                "runs": [run(each) for each in setting.runs],
                "layers": errors[at],
            }
        )
    varied = ["", *(name for name in known if name in keys)]
    return {
        "quantities": [quantity.content() for quantity in quantities],
        "x": known.index(x),
        "y": quantities.index(first),
        "panels": panels,
        "settings": described,
        "rows": [[places[id(each)] for each in row.cells.values()] for row in table.rows],
        "series": {
            known.index(name) if name else "": [
                {
                    "name": line.name,
                    "colour": line.colour,
                    "marker": line.marker,
                    "front": line.front,
                    "of": [places[id(each)] for each in line.members],
                }
                for line in plots.series(settings, name)
            ]
            for name in varied
        },
        "layers": layers,
    }


def text(content: object) -> str:
    """JSON that is safe inside a `<script>` element: no `<`, `>` or `&` is left."""
    written = json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for letter in "<>&":
        written = written.replace(letter, f"\\u{ord(letter):04x}")
    return written


def run(run: Run) -> dict[str, str]:
    """What is said of a run, by name; empty where it was not recorded."""
    provenance = run.provenance
    stages = provenance.get("stages", {}).items()
    return {
        "command": run.command,
        "folder": run.place,
        "seed": str(run.leaves.get("seed", "")),
        "seconds": ", ".join(f"{name} {stage['seconds']:.1f}" for name, stage in stages),
        "code": str(provenance.get("code", ""))[:8],
        "git": origin.revision(run),
        "machine": ", ".join(origin.devices(run)),
    }


def _numeric(settings: Sequence[Setting], keys: Sequence[str]) -> list[str]:
    """Those of `keys` that have several numbers."""

    def values(key: str) -> set[float]:
        return {value for each in settings if math.isfinite(value := each.value(key))}

    return [key for key in keys if len(values(key)) > 1]


def _quantities(
    table: Table, keys: Sequence[str], x: str
) -> tuple[list[Quantity], list[list[Any]]]:
    """Quantities that at least one setting has, and the values of each setting."""
    settings = table.settings
    found = [Quantity(name, label) for name, label in COSTS.items()]
    for column in table.columns:
        key = column.name.rpartition("/")[2]
        found.append(Quantity(column.title, "perplexity" if key == "ppl" else key, column))
    found += [Quantity(key, name) for key, name in names(keys).items()]
    if x not in [quantity.name for quantity in found]:
        found.append(Quantity(x, x))
    values = [[quantity.values(setting) for quantity in found] for setting in settings]
    kept = [
        at
        for at, quantity in enumerate(found)
        if quantity.name == x or any(line[at] not in (None, [None] * 3) for line in values)
    ]
    return [found[at] for at in kept], [[line[at] for at in kept] for line in values]


def _layers(settings: Sequence[Setting]) -> tuple[dict[str, Any] | None, list[Any]]:
    """Grids, limits and colours of the heat maps; for each setting its grid, its errors, and its
    stored bits where these differ between linears."""
    measured = [setting.by_layer("error") for setting in settings]
    if not any(measured):
        return None, [None] * len(settings)
    limits = heatmap.span(value for errors in measured for value in errors.values())
    grids: dict[tuple[str, ...], int] = {}
    shown: list[Any] = []
    every: list[float] = []  # bits that are drawn
    for setting, errors in zip(settings, measured, strict=True):
        if not errors:
            shown.append(None)
            continue
        bits = setting.by_layer("bits")
        uneven = len(bits) == len(errors) and max(bits.values()) - min(bits.values()) >= UNEVEN
        every += bits.values() if uneven else ()
        at = grids.setdefault(tuple(errors), len(grids))
        stored = [_number(bits[name]) for name in errors] if uneven else None
        shown.append([at, [_number(each) for each in errors.values()], stored])
    described = []
    for linears in grids:
        blocks, kinds = heatmap.sides(linears)
        cells = [heatmap.place(name) for name in linears]
        described.append(
            {
                "names": linears,
                "blocks": blocks,
                "kinds": [kind.rpartition(".")[2] for kind in kinds],
                "cells": [[blocks.index(block), kinds.index(kind)] for block, kind in cells],
            }
        )
    spans = {"limits": limits, "bits": [min(every), max(every)] if every else None}
    return {"grids": described, **spans, "shades": heatmap.shades()}, shown


def _number(value: float) -> float | None:
    """Six digits of a number; None where it is not finite, which JSON cannot say."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
