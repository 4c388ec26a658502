"""Report as one self-contained HTML file: no network, no server, no other file."""

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from qexp.report import embedded, html_table, plots, tables
from qexp.report.pivot import Setting, Table
from qexp.runs.finished import Run

PAGE = Path(__file__).parent / "page"
SCRIPTS = ("view.js", "maps.js", "table.js", "axes.js", "plot.js")  # in this order, one scope
# the colours of plots.COLOURS on a dark page, in their order
ON_DARK = ("#4aa3e0", "#f07f3c", "#2cc295", "#e39ac6", "#a5d8f8", "#f2bd45", "#e6e8eb", "#8f979f")
# before the page is drawn, so that it never flashes in the other theme
THEME = (
    "try { const t = localStorage.getItem('qexp-theme');"
    " if (t === 'light' || t === 'dark') document.documentElement.dataset.theme = t } catch {}"
)
LAYERS = (
    "The share of each linear's output energy that quantization changes, in the Hessian of the "
    "method (its weights' energy where it has none); the mean over seeds. One scale for all maps. "
    "Where the linears of a row are stored in different bits, a second map shows those."
)
MANY = 12  # lines of a list that is shown unfolded


def page(
    table: Table,
    sheet: tables.Sheet,
    legend: Sequence[str],
    notes: Sequence[str],
    x: str = "weight/bits",
) -> str:
    """The whole document: plots, table, errors by layer, runs, protocols and skipped runs.

    `notes`: one line per skipped run. `x`: the quantity on the plots' x axis at first.
    """
    settings = table.settings
    runs = [run for setting in settings for run in setting.runs]
    content = embedded.content(table, sheet.numbers, x)
    style = _read("page.css") + _colours() + html_table.widths(sheet)
    script = "'use strict';\n(() => {\n" + "".join(map(_read, SCRIPTS)) + "})();\n"
    facts = ", ".join([_count(len(settings), "setting"), _count(len(runs), "run")])
    if shared := common(settings):
        facts += f" · {shared}"
    parts = [
        "<header><div><h1>qexp report</h1>"
        f'<p class="facts">{escape(facts)}</p></div>'
        '<button id="theme" type="button">Theme: auto</button></header>',
        _filter(),
        _plot(),
        f'<section><h2 class="hidden">Settings</h2><div class="wide" role="region" tabindex="0" '
        f'aria-label="Table of settings">{html_table.table(table, sheet)}</div>'
        + "".join(f'<p class="legend">{escape(line)}</p>' for line in legend)
        + "</section>",
        _maps(content["layers"]),
        f"<section><h2>Protocols</h2>{_protocols(runs)}</section>",
        _left_out(notes),
        "<footer>Keys: <kbd>/</kbd> filter, <kbd>↑</kbd> <kbd>↓</kbd> rows, <kbd>Enter</kbd> "
        "details of a row, <kbd>←</kbd> <kbd>→</kbd> points of the plot.</footer>",
        '<div id="tip" role="status"></div>',
        f'<script type="application/json" id="data">{embedded.text(content)}</script>',
        f"<script>{script}</script>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(style, [THEME, script])}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<title>qexp report</title><link rel="icon" href="data:,">'
        f"<style>{style}</style><script>{THEME}</script></head>\n<body>\n"
        + "\n".join(filter(None, parts))
        + "\n</body></html>\n"
    )


def common(settings: Sequence[Setting]) -> str:
    """The main choices (model, data, bits …) that all settings share, as `key=value`."""
    shared = []
    for key in ("model", "data", "calibration", "weight", "weight.group_size", "activation", "kv"):
        labels = {setting.label(key) for setting in settings} - {"", "float"}
        if len(labels) == 1 and (label := labels.pop()) != "none":
            shared.append(f"{key}={label}")
    return ", ".join(shared)


def _read(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _policy(style: str, scripts: Sequence[str]) -> str:
    """A content security policy: only this page's style and scripts, and nothing from outside."""

    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    allowed = " ".join(map(digest, scripts))
    return (
        f"default-src 'none'; img-src data:; style-src {digest(style)}; script-src {allowed}; "
        "base-uri 'none'; form-action 'none'"
    )


def _colours() -> str:
    pairs = zip(plots.COLOURS, ON_DARK, strict=True)
    lines = [f"--series{at}: light-dark({light}, {dark})" for at, (light, dark) in enumerate(pairs)]
    return f":root {{ {'; '.join(lines)} }}\n"


def _filter() -> str:
    return (
        '<section id="filter" role="search"><input id="query" type="search" autocomplete="off" '
        'aria-label="Filter rows" placeholder="Filter: words of a row or command ( / )">'
        '<span id="choices" class="controls"></span>'
        '<button id="clear" type="button" hidden>Clear</button>'
        '<output id="count" aria-live="polite"></output></section>'
    )


def _plot() -> str:
    choices = "".join(
        f'<label>{name} <select id="{axis}"></select></label>'
        f'<label><input type="checkbox" id="log{axis}"> logarithmic</label>'
        for axis, name in (("y", "Metric"), ("x", "against"))
    )
    return (
        f'<section><h2 class="hidden">Plot</h2><div class="controls">{choices}</div>'
        '<ul id="names" aria-label="Lines of the plot"></ul><div id="panels"></div>'
        "<noscript><p>The plot, the filter and the details of runs need JavaScript; the file "
        "table.md has the commands.</p></noscript></section>"
    )


def _maps(layers: dict[str, Any] | None) -> str:
    if layers is None:
        return ""
    low, high = layers["limits"]
    return (
        f'<section><h2>Errors by layer</h2><p class="legend">{LAYERS} <span class="scale">'
        f'≤ {low:.2g} <canvas id="bar"></canvas> ≥ {high:.2g}</span></p>'
        '<details id="maps"><summary>Maps of the rows above</summary>'
        '<div class="maps" id="figures"></div><button id="more" type="button" hidden></button>'
        "</details></section>"
    )


def _left_out(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    lines = "".join(f"<li>{escape(note)}</li>" for note in notes)
    opened = " open" if len(notes) <= MANY else ""
    title = f"<summary>{_count(len(notes), 'run')}</summary>"
    return f"<section><h2>Left out</h2><details{opened}>{title}<ul>{lines}</ul></details></section>"


def _protocols(runs: Iterable[Run]) -> str:
    definitions = {}
    for run in runs:
        for name, entry in run.provenance.get("protocols", {}).items():
            definition = json.dumps(entry.get("definition", {}), indent=1, ensure_ascii=False)
            dtypes = entry.get("dtype"), entry.get("protocol_dtype")
            note = ""
            if None not in dtypes and dtypes[0] != dtypes[1]:
                note = " in {}; published numbers are of {} models".format(*dtypes)
            definitions[f"{name} [{entry.get('digest', '')}]{note}"] = definition
    return "".join(
        f"<details><summary>{escape(name)}</summary><code>{escape(text)}</code></details>"
        for name, text in definitions.items()
    )
