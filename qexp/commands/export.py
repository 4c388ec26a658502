"""Command `qexp export RUN OUT format=…`: a run's model in a format of other software."""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import seed_everything
from omegaconf import OmegaConf

from qexp import pipeline
from qexp.common.errors import UserError
from qexp.eval.perplexity import Perplexity
from qexp.eval.stage import evaluate
from qexp.models.code_formats import FORMATS
from qexp.models.export import FLOAT, GGUF, Options, export, fits
from qexp.packed.formats.gguf import TYPES
from qexp.runs import resolvers, results, used_modules
from qexp.runs.provenance import Provenance
from qexp.task import Task

# each but the last verifies what those before it do, and the last what the first two do
FILE, LIBRARY, PROTOCOL, TARGET = "file", "library", "protocol", "target"
CHOICES = {
    "format": (*FORMATS, GGUF, FLOAT),
    "verify": (FILE, LIBRARY, PROTOCOL, TARGET),
    "widen": ("true", "false"),
    "container": ("auto", *TYPES),
}


def main(arguments: Sequence[str]) -> None:
    """Writes the export after it was read back; without OUT, prints what each format would hold."""
    parser = argparse.ArgumentParser(
        "qexp export",
        description=main.__doc__,
        usage=f"qexp export RUN [OUT] [format=NAME] [verify={'|'.join(CHOICES['verify'])}] "
        "[widen=true] [container=NAME]",
    )
    parser.add_argument("run", type=Path, help="folder of a finished run with its weights")
    parser.add_argument("rest", nargs="*", help="OUT, a new folder or FILE.gguf, and key=value")
    given = parser.parse_args(arguments)
    words, outs = parsed(given.rest)
    if len(outs) > 1:
        raise UserError(f"{outs[1]}: qexp export takes one run and one OUT")
    if outs and words.get("format") == "":
        raise UserError("format: has no value; leave OUT out to see what fits the run")
    resolvers.register()
    if not outs:
        for name, said in fits(given.run).items():
            print(f"{name}: {said}")
        return
    out = Path(outs[0])
    facts = export(given.run, out, words.get("format", FLOAT), chosen(given.run, words))
    print("\n".join(report(out, facts)))


def parsed(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The words key=value of a command line, and its other arguments. UserError for an unknown
    key."""
    words = dict(word.split("=", 1) for word in arguments if "=" in word)
    for key, value in words.items():
        if key not in CHOICES:
            raise UserError(f"{key}={value}: is no key of an export; give {' or '.join(CHOICES)}")
        if value and value not in CHOICES[key]:
            raise UserError(f"{key}={value} is unknown: give {' or '.join(CHOICES[key])}")
    return words, [word for word in arguments if "=" not in word]


def chosen(run: Path, words: Mapping[str, str]) -> Options:
    """The options that the words of a command line choose."""
    verify, container = words.get("verify") or LIBRARY, words.get("container") or "auto"
    return Options(
        library=verify != FILE,
        measure=partial(measure, run) if verify == PROTOCOL else None,
        compute=partial(perplexities, run) if verify == TARGET else None,
        widen=words.get("widen") == "true",
        container=None if container == "auto" else container,
    )


def report(out: Path, facts: Mapping[str, Any]) -> list[str]:
    """What was written and verified, in lines."""
    first = facts["verified"][0]
    bits = f", {facts['bits']:.3f} bits a weight" if facts["bits"] is not None else ""
    lines = [
        f"{out}  {facts['format']}{bits}",
        f"read back: {first['matrices']} coded matrices and {first['tensors']} tensors equal the "
        "run's",
    ]
    lines += [loaded(fact) for fact in facts["verified"] if fact["level"] == 1]
    for name, value in facts.get("measured", {}).items():
        lines.append(
            f"{name}: {value:.6g} from the export, {facts['metrics'][name]:.6g} in the run"
        )
    for name, value in facts.get("computed", {}).items():
        lines.append(f"{name}: {value:.6g} by {facts['verified'][-1]['library']}")
    return lines


def loaded(fact: Mapping[str, Any]) -> str:
    """What the library that reads the format computed, or why it was not asked."""
    if "skipped" in fact:
        return f"not loaded by the library that reads it: {fact['skipped']}"
    return (
        f"loaded by {fact['library']}: largest difference of a logit {fact['max_logit']:.2g}, "
        f"KL {fact['kl']:.2g}" + (f"; none with {fact['equal']}" if "equal" in fact else "")
    )


@torch.no_grad()
def measure(run: Path, place: Path) -> dict[str, Any]:
    """The run's perplexities from an export, under the run's own protocols: `measured`."""
    cfg = results.config(str(run))
    source = pipeline.build(cfg).source
    model = {
        "_target_": "qexp.models.local.Local",
        "path": str(place),
        "dtype": source.settled_dtype(),
        "objective": source.objective,
        "load": cfg.model.get("load", "whole"),
    }
    OmegaConf.set_struct(cfg, False)
    cfg.model = model
    cfg.transform = {"_target_": "qexp.step.Nothing"}
    cfg.method = {"_target_": "qexp.step.Nothing"}
    seed_everything(cfg.seed, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        return {
            "measured": perplexities(run, pipeline.load(pipeline.build(cfg), cfg, Path(folder)))
        }


@torch.no_grad()
def perplexities(run: Path, task: Task, windows: int | None = None) -> dict[str, float]:
    """Those of a task under the protocols of a run, where the run measured them too. windows: how
    many of each protocol at most. UserError where the run measured none."""
    cfg, stored = results.config(str(run)), results.metrics(run)
    asked = [each for each in pipeline.build(cfg).evaluators if isinstance(each, Perplexity)]
    if windows is not None:
        asked = [replace(each, limit=min(each.limit or windows, windows)) for each in asked]
    found = evaluate(asked, task, Provenance(used_modules.roots(cfg)))
    measured = {
        name: value for name, value in found.items() if name.endswith("/ppl") and name in stored
    }
    if not measured:
        raise UserError("verify: the run measured no perplexity; say verify=library")
    return measured
