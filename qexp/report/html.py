"""Report as one self-contained HTML file: no network, no server, no other file."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from qexp.report import heatmap, origin, plots, tables
from qexp.report.pivot import Setting, Table, differing
from qexp.runs.finished import Column, Run

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 104rem; padding: 0 1rem;
  color: #1d1d1f }
h1 { font-size: 1.5rem; margin-bottom: 0 } h2 { font-size: 1.15rem; margin-top: 2.2rem }
.facts, .legend, small { color: #666; font-size: .85rem }
.wide { overflow: auto; max-height: 88vh } @media print { .wide { max-height: none } }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .22rem .6rem; text-align: left; white-space: nowrap; vertical-align: top }
thead th { font-weight: 600; box-shadow: 0 1.5px #333; white-space: normal;
  max-width: 9rem; vertical-align: bottom }
thead { position: sticky; top: 0; z-index: 1; background: #fff }
tbody { border-top: 1.5px solid #333 }
thead th.above { text-align: center; border-bottom: 1px solid #aaa }
thead th[data-sort] { cursor: pointer }
tbody tr { border-bottom: 1px solid #eee } tbody tr:hover { background: #f4f7fb }
td.number, th.number { text-align: right } td.best { font-weight: 700 }
td.words { white-space: normal; min-width: 20rem; font-size: .85rem }
#table tr > :first-child { position: sticky; left: 0; background: #fff }
td small { display: block; font-weight: 400 } td a { color: inherit; text-decoration: none }
code { font: .85em ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
#runs td { white-space: normal }
svg { max-width: max(100%, 56rem); height: auto; display: block }
.mark:hover path { stroke: #000; stroke-width: 1.5 }
.maps { display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: flex-end }
.maps figure { margin: 0; width: 15rem }
figcaption { font-size: .8rem; margin-bottom: .3rem }
#tip { position: fixed; display: none; max-width: 36rem; background: #1d1d1f; color: #fff;
  padding: .4rem .6rem; border-radius: .3rem; font-size: .82rem; white-space: pre-line;
  pointer-events: none }
"""
# tooltips appear without the browser's delay; a click on a column title sorts the rows
SCRIPT = """
const tip = document.getElementById('tip');
for (const title of document.querySelectorAll('.mark > title')) {
  title.parentNode.dataset.says = title.textContent; title.remove();
}
for (const cell of document.querySelectorAll('[title]')) {
  cell.dataset.says = cell.title; cell.removeAttribute('title');
}
document.addEventListener('mousemove', event => {
  const says = event.target.closest?.('[data-says]')?.dataset.says;
  tip.style.display = says ? 'block' : 'none'; tip.textContent = says;
  tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + 'px';
  tip.style.top = Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8) + 'px';
});
const sort = head => {
  const body = head.closest('table').tBodies[0], at = +head.dataset.sort;
  const key = row => row.cells[at].dataset.value ?? row.cells[at].textContent;
  const down = head.dataset.down = head.dataset.down ? '' : '1';
  const compare = (a, b) => isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
  [...body.rows].sort((a, b) => (down ? 1 : -1) * compare(key(a), key(b)))
    .forEach(row => body.append(row));
};
for (const head of document.querySelectorAll('th[data-sort]'))
  head.addEventListener('click', () => sort(head));
"""


def page(
    table: Table,
    sheet: tables.Sheet,
    legend: Sequence[str],
    notes: Sequence[str],
    x: str = "weight/bits",
) -> str:
    """The whole document: plots, table, errors by layer, runs, protocols and skipped runs.

    `notes`: one line per skipped run. `x`: the quantity on the plots' x axis.
    """
    settings = table.settings
    runs = [run for setting in settings for run in setting.runs]

    def say(setting: Setting, column: Column) -> str:
        return "\n".join(
            [
                f"{column.title}: {tables.spread(setting, column)}",
                f"{setting.value(x):.2f} {'bits per weight' if x == 'weight/bits' else x}",
                setting.run.command,
                *(str(run.folder) for run in setting.runs),
            ]
        )

    parts = [
        f"<h1>qexp: {len(settings)} settings, {len(runs)} runs</h1>",
        f'<p class="facts">{escape(common(settings))}</p>',
        f'<div class="wide">{plots.against_bits(settings, table.columns, x, say).svg()}</div>',
        f'<h2>Settings</h2><div class="wide">{_table(sheet)}</div>',
        *(f'<p class="legend">{escape(line)}</p>' for line in legend),
        *_maps(settings, sheet.numbers),
        f'<h2>Runs</h2><div class="wide">{_runs(settings, sheet.numbers)}</div>',
        f"<h2>Protocols</h2>{_protocols(runs)}",
    ]
    if notes:
        lines = "".join(f"<li>{escape(note)}</li>" for note in notes)
        parts.append(f"<h2>Left out</h2><ul>{lines}</ul>")
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><title>qexp report</title>'
        f'<link rel="icon" href="data:,"><style>{STYLE}{heatmap.STYLE}</style></head>\n'
        f"<body>\n{body}\n"
        f'<div id="tip"></div><script>{SCRIPT}</script></body></html>\n'
    )


def common(settings: Sequence[Setting]) -> str:
    """The main choices (model, data, bits …) that all settings share, as `key=value`."""
    shared = []
    for key in ("model", "data", "calibration", "weight", "weight.group_size", "activation", "kv"):
        labels = {setting.label(key) for setting in settings} - {"", "float"}
        if len(labels) == 1 and (label := labels.pop()) != "none":
            shared.append(f"{key}={label}")
    return ", ".join(shared)


def _table(sheet: tables.Sheet) -> str:
    kinds = ["" if i < sheet.labels else ' class="number"' for i in range(len(sheet.heads))]
    above = ""
    if any(head for head, _ in sheet.heads):
        groups: list[list[object]] = []
        for head, _ in sheet.heads:
            if groups and groups[-1][0] == head:
                groups[-1][1] = int(str(groups[-1][1])) + 1
            else:
                groups.append([head, 1])
        cells = "".join(
            f'<th colspan="{count}"{" class=above" if head else ""}>{escape(str(head))}</th>'
            for head, count in groups
        )
        above = f"<tr>{cells}</tr>"
    titles = "".join(
        f'<th{kind} data-sort="{i}">{_breakable(title)}</th>'
        for i, ((_, title), kind) in enumerate(zip(sheet.heads, kinds, strict=True))
    )
    lines = [
        "".join(
            _cell(cell, i >= sheet.labels, sheet, sheet.titles[i]) for i, cell in enumerate(cells)
        )
        for cells in sheet.rows
    ]
    rows = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return f'<table id="table"><thead>{above}<tr>{titles}</tr></thead><tbody>{rows}</tbody></table>'


def _cell(cell: tables.Cell, is_number: bool, sheet: tables.Sheet, title: str) -> str:
    words = title == tables.TOGETHER
    classes = " ".join(["number"] * is_number + ["best"] * cell.bold + ["words"] * words)
    value = f' data-value="{cell.value}"' if cell.value == cell.value else ""
    hover = ""
    if cell.setting is not None:
        tooltip = [cell.setting.run.command, *(run.place for run in cell.setting.runs)]
        hover = f' title="{escape(chr(10).join(tooltip))}"'
    note = f"<small>{escape(cell.note)}</small>" if cell.note else ""
    text = escape(cell.text) + f"<sup>{tables.LEVEL}</sup>" * cell.level
    if cell.setting is not None and text:
        text = f'<a href="#run{sheet.numbers[id(cell.setting)]}">{text}</a>'
    return f'<td class="{classes}"{value}{hover}>{text}{note}</td>'


def _breakable(title: str) -> str:
    """A title that may be wrapped after `/`, `_` and `.`."""
    return re.sub(r"([/_.])", r"\1<wbr>", escape(title))


def _maps(settings: Sequence[Setting], numbers: Mapping[int, int]) -> list[str]:
    """Heat maps of the errors by layer, all on one colour scale so that they can be compared."""
    measured = [(setting, errors) for setting in settings if (errors := setting.layers)]
    if not measured:
        return []
    limits = heatmap.span(value for _, errors in measured for value in errors.values())
    keys = differing([setting for setting, _ in measured])
    figures = []
    for setting, errors in measured:
        words = [word for word in setting.words(keys).values() if word != "none"]
        name = f"<b>{numbers[id(setting)]}</b> {escape(', '.join(words))}"
        picture = heatmap.heat_map(errors, limits)
        figures.append(f"<figure><figcaption>{name}</figcaption>{picture}</figure>")
    legend = (
        "The share of each linear's output energy that quantization changes, in the Hessian of the "
        "method (its weights' energy where it has none); the mean over seeds. "
        f"One scale for all: {heatmap.scale(limits)}."
    )
    opened = " open" if len(figures) <= 12 else ""
    return [
        f'<h2>Errors by layer</h2><p class="legend">{legend}</p>',
        f"<details{opened}><summary>{len(figures)} maps</summary>",
        f'<div class="maps">{"".join(figures)}</div></details>',
    ]


def _runs(settings: Iterable[Setting], numbers: Mapping[int, int]) -> str:
    lines = []
    for setting in settings:
        for run in setting.runs:
            lines.append(_run(run, numbers[id(setting)], run is setting.runs[0]))
    titles = ("run", "command, folder", "seed", "seconds by stage", "code", "git", "machine")
    heads = "".join(f"<th>{title}</th>" for title in titles)
    return (
        f'<table id="runs"><thead><tr>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    )


def _run(run: Run, number: int, first: bool) -> str:
    provenance = run.provenance
    stages = ", ".join(
        f"{name} {stage['seconds']:.1f}" for name, stage in provenance.get("stages", {}).items()
    )
    cells = [
        f"<code>{escape(run.command)}<br>{escape(run.place)}</code>",
        escape(str(run.leaves.get("seed", ""))),
        escape(stages),
        escape(str(provenance.get("code", ""))[:8]),
        escape(origin.revision(run)),
        escape(", ".join(origin.devices(run))),
    ]
    mark = f' id="run{number}"' if first else ""
    return f"<tr{mark}><td>{number}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>\n"


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
