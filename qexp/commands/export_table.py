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
from qexp.report.formats import markdown
from qexp.report.tables import Cell, Sheet
from qexp.runs import resolvers, results
from qexp.runs.provenance import stamp
from qexp.runs.results import write_json
from qexp.runs.signature import signature

FORMATS = ("compressed_tensors", GGUF)


def main(arguments: Sequence[str]) -> None:
    """Exports runs, computes their perplexities from each export by transformers or by llama.cpp,
    and prints a table of them next to the runs' own. What is in DIR is used again."""
    parser = argparse.ArgumentParser("qexp export-table", description=main.__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs with weights")
    parser.add_argument("--to", type=Path, required=True, help="folder of the exports")
    parser.add_argument(
        "--formats", default=",".join(FORMATS), help=f"separated by commas; {','.join(FORMATS)}"
    )
    parser.add_argument("--protocol", help="of the runs, by its name; all by default")
    given = parser.parse_args(arguments)
    formats = given.formats.split(",")
    for name in formats:
        if name not in CHOICES["format"]:
            raise UserError(f"--formats {name}: is unknown; give {', '.join(CHOICES['format'])}")
    resolvers.register()
    given.to.mkdir(parents=True, exist_ok=True)
    found = [
        {name: made(run, given.to, name, given.protocol) for name in formats} for run in given.runs
    ]
    print("\n".join(table(given.runs, found)))


def made(run: Path, folder: Path, format: str, protocol: str | None = None) -> dict[str, Any]:
    """The facts of the run's export in `folder`, with the `size` of its weights in bytes; or why
    the format does not hold the run: `refused`. They are kept in a file next to the export."""
    place = folder / f"{signature(results.config(str(run)))}-{format}"
    out = place.with_suffix(f".{GGUF}") if format == GGUF else place
    kept, made_from = place.with_suffix(".json"), stamp(run / results.PROVENANCE)
    if kept.is_file() and out.exists():
        facts: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        if facts["provenance"] == made_from:
            return facts
    check(out)
    options = Options(library=False, compute=partial(perplexities, run, protocol=protocol))
    try:
        facts = export(run, out, format, options)
    except UserError as error:
        return {"refused": str(error)}
    weights = [out] if format == GGUF else sorted(out.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in weights)
    facts |= {"size": size, "provenance": made_from}
    write_json(kept, facts)
    return facts


def table(runs: Sequence[Path], found: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """Lines of Markdown: a row for each run and protocol, and below it the software, the largest
    divergences and what was refused."""
    words = [results.overrides(run) for run in runs]
    common = set(words[0]).intersection(*words[1:])
    formats = list(found[0])
    rows, notes = [], []
    for run, own, each in zip(runs, words, found, strict=True):
        metrics = results.metrics(run)
        label = " ".join(word for word in own if word not in common) or run.name
        computed = {name for facts in each.values() for name in facts.get("computed", ())}
        for name in (key for key in metrics if key in computed):
            cells = [label, name.removesuffix("/ppl"), f"{metrics[name]:.4f}"]
            for format in formats:
                cells += _cells(each[format], name, metrics[name])
            rows.append(tuple(map(Cell, cells)))
        notes += [
            f"{label}: {format}: {facts['refused']}"
            for format, facts in each.items()
            if "refused" in facts
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


def _software(
    formats: Sequence[str], found: Sequence[Mapping[str, Mapping[str, Any]]]
) -> list[str]:
    lines = []
    for format in formats:
        facts = [each[format]["verified"][-1] for each in found if "verified" in each[format]]
        for name in dict.fromkeys(fact["library"] for fact in facts):
            largest = max(fact["kl"] for fact in facts if fact["library"] == name)
            lines.append(f"{format}: {name}; largest KL from a run on random tokens {largest:.1e}.")
    return lines
