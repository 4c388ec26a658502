"""Command `qexp export-table RUN… --to DIR`: what the software that formats are for computes."""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from qexp.commands.export import CHOICES, perplexities
from qexp.common.errors import UserError
from qexp.models.export import GGUF, Options, check, export
from qexp.models.exported_run import ExportedRun
from qexp.report.formats import markdown
from qexp.report.tables import Cell, Sheet
from qexp.runs import resolvers, results
from qexp.runs.provenance import stamp
from qexp.runs.results import write_json
from qexp.runs.signature import signature

FORMATS = ("compressed_tensors", GGUF)
Measured = Mapping[str, Any]  # of one run: `own`, and for each format the facts of its export


def main(arguments: Sequence[str]) -> None:
    """Exports runs, computes their perplexities from each export by transformers or by llama.cpp,
    and prints a table of them next to the runs' own. What is in DIR is used again."""
    parser = argparse.ArgumentParser("qexp export-table", description=main.__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs with weights")
    parser.add_argument("--to", type=Path, required=True, help="folder of the exports")
    parser.add_argument(
        "--formats", default=",".join(FORMATS), help=f"separated by commas; {','.join(FORMATS)}"
    )
    parser.add_argument(
        "--windows",
        type=int,
        help="the first ones of each protocol, which the run's model computes too; all by default",
    )
    given = parser.parse_args(arguments)
    formats = given.formats.split(",")
    for name in formats:
        if name not in CHOICES["format"]:
            raise UserError(f"--formats {name}: is unknown; give {', '.join(CHOICES['format'])}")
    if given.windows is not None and given.windows < 1:
        raise UserError(f"--windows {given.windows}: give 1 or more")
    resolvers.register()
    given.to.mkdir(parents=True, exist_ok=True)
    found = [measured(run, given.to, formats, given.windows) for run in given.runs]
    print("\n".join(table(given.runs, formats, found)))


def measured(
    run: Path, folder: Path, formats: Sequence[str], windows: int | None = None
) -> Measured:
    """`own`: the run's perplexities; for each format the facts of its export, with the `size` of
    its weights in bytes, or why it was `refused`. Kept in a file next to the exports."""
    name = signature(results.config(str(run)))
    kept = folder / f"{name}.json"
    source = {"provenance": stamp(run / results.PROVENANCE), "windows": windows}
    found = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    if {key: found.get(key) for key in source} != source:
        own = results.metrics(run)
        if windows is not None:
            own = perplexities(run, ExportedRun.read(run).task, windows)
        found = source | {"own": own}
    for format in formats:
        if format not in found:
            out = folder / (f"{name}.{GGUF}" if format == GGUF else f"{name}-{format}")
            found[format] = made(run, out, format, windows)
            write_json(kept, found)
    return dict(found)


def made(run: Path, out: Path, format: str, windows: int | None) -> dict[str, Any]:
    """Of one export."""
    check(out)
    compute = partial(perplexities, run, windows=windows)
    try:
        facts = export(run, out, format, Options(library=False, compute=compute))
    except UserError as error:
        return {"refused": str(error)}
    weights = [out] if format == GGUF else sorted(out.glob("*.safetensors"))
    return facts | {"size": sum(path.stat().st_size for path in weights)}


def table(runs: Sequence[Path], formats: Sequence[str], found: Sequence[Measured]) -> list[str]:
    """Lines of Markdown: a row for each run and protocol, and below it the software, the largest
    divergences and what was refused."""
    words = [results.overrides(run) for run in runs]
    common = set(words[0]).intersection(*words[1:])
    rows, notes = [], []
    for run, own, each in zip(runs, words, found, strict=True):
        label = " ".join(word for word in own if word not in common) or run.name
        computed = {name for format in formats for name in each[format].get("computed", ())}
        for name in (key for key in each["own"] if key in computed):
            cells = [label, name.removesuffix("/ppl"), f"{each['own'][name]:.4f}"]
            for format in formats:
                cells += _cells(each[format], name, each["own"][name])
            rows.append(tuple(map(Cell, cells)))
        notes += [
            f"{label}: {format}: {each[format]['refused']}"
            for format in formats
            if "refused" in each[format]
        ]
    heads = ["run", "protocol", "run's"]
    for format in formats:
        heads += [format, "difference", "MB"]
    sheet = Sheet(tuple(("", head) for head in heads), 2, tuple(rows), {})
    return [markdown(sheet), "", *_software(formats, found), *notes]


def _cells(facts: Mapping[str, Any], name: str, own: float) -> list[str]:
    """The number, its difference from the run's in nats per token, and the size."""
    if "refused" in facts:
        return ["", "", ""]
    value = facts["computed"][name]
    return [f"{value:.4f}", f"{math.log(value / own):+.1e}", f"{facts['size'] / 1e6:.1f}"]


def _software(formats: Sequence[str], found: Sequence[Measured]) -> list[str]:
    lines = []
    for format in formats:
        facts = [each[format]["verified"][-1] for each in found if "verified" in each[format]]
        for name in dict.fromkeys(fact["library"] for fact in facts):
            largest = max(fact["kl"] for fact in facts if fact["library"] == name)
            lines.append(f"{format}: {name}; largest KL from a run on random tokens {largest:.1e}.")
    return lines
