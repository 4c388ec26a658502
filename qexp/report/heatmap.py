"""HTML heat map of layer errors: a row per block, a column per linear of a block."""

import math
import re
from collections.abc import Iterable, Mapping
from html import escape

STYLE = """
.heat { display: inline-grid; gap: 1px; font: 10px/10px system-ui, sans-serif; color: #444 }
.heat i { width: 2.2em; min-height: 8px } .heat b { font-weight: 400; text-align: right;
  padding-right: 4px; overflow: visible; height: 8px }
.heat span { writing-mode: vertical-rl; transform: rotate(180deg); justify-self: center }
.bar { white-space: nowrap }
.scale { display: inline-block; width: 12rem; height: .7em; margin: 0 .5em }
"""
SHADES = 32


def heat_map(errors: Mapping[str, float], limits: tuple[float, float]) -> str:
    """Colours the logarithm of each error between `limits`; zero and non-finite errors are white.

    `errors`: by the linear's full name.
    """
    places = {place(name): name for name in errors}
    blocks, kinds = sides(errors)
    step = math.ceil(len(blocks) / 10)
    colours, (low, high) = shades(), map(math.log, limits)
    cells = ["<b></b>", *(f"<span>{escape(kind.rpartition('.')[2])}</span>" for kind in kinds)]
    for index, block in enumerate(blocks):
        cells.append(f"<b>{block if index % step == 0 else ''}</b>")
        for kind in kinds:
            if (name := places.get((block, kind))) is None:
                cells.append("<i></i>")
                continue
            error, shade = errors[name], "#fff"
            if error > 0 and math.isfinite(error):
                share = (math.log(error) - low) / max(high - low, 1e-9)
                shade = colours[round(min(max(share, 0), 1) * (SHADES - 1))]
            tooltip = escape(f"{name}: {error:.3g}")
            cells.append(f'<i style="background:{shade}" title="{tooltip}"></i>')
    columns = f"grid-template-columns:auto repeat({len(kinds)},auto)"
    return f'<div class="heat" style="{columns}">{"".join(cells)}</div>'


def scale(limits: tuple[float, float]) -> str:
    """The colour bar that belongs to `limits`."""
    bar = f'<i class="scale" style="background:linear-gradient(90deg,{",".join(shades())})"></i>'
    return f'<span class="bar">≤ {limits[0]:.2g}{bar}≥ {limits[1]:.2g}</span>'


def place(name: str) -> tuple[int, str]:
    """The block index of a linear, and its name inside the block."""
    match = re.match(r"(?:.*?\.)?(\d+)\.(.+)", name)
    return (int(match[1]), match[2]) if match else (0, name)


def sides(names: Iterable[str]) -> tuple[list[int], list[str]]:
    """The rows of a map (blocks in order) and its columns (linears of a block)."""
    places = [place(name) for name in names]
    return sorted({block for block, _ in places}), list(dict.fromkeys(kind for _, kind in places))


def span(values: Iterable[float]) -> tuple[float, float]:
    """The limits that contain the middle 96% of the positive values; the rest is clipped."""
    shown = sorted(value for value in values if value > 0 and math.isfinite(value))
    clipped = len(shown) // 50
    return (shown[clipped], shown[-1 - clipped]) if shown else (1e-6, 1.0)


def shades() -> list[str]:
    """Colours from the smallest error to the largest."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["magma_r"](0.04 + 0.9 * i / (SHADES - 1))) for i in range(SHADES)]
