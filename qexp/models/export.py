"""Export of a finished run's model: a folder of float weights or of codes, read back before it
appears."""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qexp.common import on_disk
from qexp.common.errors import UserError
from qexp.common.files import atomic, atomic_folder
from qexp.models import code_formats, gguf_file, model_card, target_library
from qexp.models.code_formats import FORMATS, SECTION
from qexp.models.exported_run import ExportedRun
from qexp.models.linearize import published
from qexp.packed.base import Packed
from qexp.packed.coded import Coded
from qexp.packed.formats import gguf as blocks
from qexp.packed.formats.checks import widened
from qexp.runs.results import write_json
from qexp.task import CausalLM, Task

log = logging.getLogger(__name__)

FLOAT, GGUF = "float", "gguf"
FACTS = "qexp.json"  # in a folder
# Bytes of a file of a model on disk: the writer touches all pages of a file before any can leave
# memory.
SHARD = 2**29
Verify = Callable[[Path], dict[str, Any]]
Compute = Callable[[Task], dict[str, float]]


@dataclass(frozen=True)
class Options:
    """Choices of an export.

    library: whether the library that reads the format loads the export, where it is installed.
    measure: measures the export before it appears.
    compute: measures the task that the software computes which the export is for.
    widen: asymmetric codes are stored as symmetric ones of one bit more, which every reader loads.
    container: the block type of all matrices in GGUF; null: the smallest that holds each.
    """

    library: bool = True
    measure: Verify | None = None
    compute: Compute | None = None
    widen: bool = False
    container: str | None = None

    def check(self, format: str) -> None:
        """UserError for a choice that the format does not have."""
        if self.widen and format not in FORMATS:
            raise UserError(
                f"widen=true: the codes of format={format} are signed already; leave it out"
                if format == GGUF
                else f"widen=true: format={format} has no codes; leave it out"
            )
        if self.container is not None and format != GGUF:
            raise UserError(f"container={self.container}: is a block type of format=gguf alone")


def check(out: Path) -> None:
    """UserError where `out` exists and is not an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: already exists; name another folder, or delete it")


def export(
    run: Path, out: Path, format: str = FLOAT, options: Options = Options()
) -> dict[str, Any]:
    """Write the model and the tokenizer of a finished run atomically, as transformers and
    `model=local model.path=OUT` read them; the facts in `qexp.json`.

    format: `float`, `gguf`, or a key of FORMATS; codes are those of the run. The export is read
    back and compared, every matrix and every float tensor, and verified as `options` say, before it
    appears. Raises UserError for what the format cannot hold: with the run's key in a format of
    codes; activation quantizers and parameters that the family does not have in a float one.
    """
    check(out)
    options.check(format)
    source = ExportedRun.read(run)
    coded: Mapping[str, Coded] = {}
    if format == GGUF:
        return _gguf(source, out, options)
    if format == FLOAT:
        source.refuse_activations()
        state, section = published(source.model), None
    else:
        coded = source.coded(FORMATS[format].refusal, widened if options.widen else None)
        state, section = source.with_codes(FORMATS[format], coded)
    kept = dict(state)  # save_pretrained empties the dict
    with atomic_folder(out) as folder:
        mapped = any(map(on_disk.is_mapped, state.values()))
        shards = {"max_shard_size": SHARD} if mapped else {}
        source.model.save_pretrained(folder, state_dict=state, **shards)
        for path in folder.glob("*.safetensors"):
            path.chmod((folder / "config.json").stat().st_mode)  # its writer makes it private
        _add_section(folder, format, section)
        if source.tokenizer is not None:
            source.tokenizer.save_pretrained(folder)
        facts = source.facts(format) | {"bits": source.bits(kept, coded)}
        stored = {name: source.packed[name] for name in coded}
        facts["verified"] = [read_back(folder, format, section, kept, stored)]
        _verify(source, folder, format, coded, section, facts, options)
        write_json(folder / FACTS, facts)
        card = model_card.text(source, facts, coded)
        (folder / "README.md").write_text(card, encoding="utf-8")
    log.info("%s: use it as model=local model.path=%s", out, out)
    return facts


def _verify(
    source: ExportedRun,
    place: Path,
    format: str,
    coded: Mapping[str, Coded],
    section: Mapping[str, Any] | None,
    facts: dict[str, Any],
    options: Options,
) -> None:
    """Add to the facts what the library computes from the export (level 1), what is measured from
    it (level 2), and what the software that it is for measures (level 3)."""
    if options.library:
        fact = target_library.check(source, place, format, coded, section)
        facts["verified"].append(fact)
    if options.measure is not None:
        found = options.measure(place)
        facts |= found
        facts["verified"].append({"level": 2, "metrics": sorted(found["measured"])})
    if options.compute is not None:
        name, task = target_library.computing(source, place, format, section)
        facts["computed"] = options.compute(task)
        fact = {"level": 3, "library": name, "metrics": sorted(facts["computed"])}
        if isinstance(task, CausalLM):
            fact["kl"] = max(target_library.divergence(source, coded, task), 0.0)
        facts["verified"].append(fact)


def _gguf(source: ExportedRun, out: Path, options: Options) -> dict[str, Any]:
    """A single file, whose key `qexp.facts` is what `qexp.json` is in a folder."""
    if out.suffix != f".{GGUF}":
        raise UserError(f"{out}: format=gguf writes one file, whose name ends with .gguf")
    source.refuse_activations()
    coded, origin = source.coded(blocks.refusal), source.gguf_origin()
    model, facts = source.model, source.facts(GGUF)
    state = published(model)
    content = gguf_file.Content(model, source.tokenizer, coded, origin, options.container)
    facts["containers"], facts["bits"] = content.summary()
    with atomic(out) as path:
        gguf_file.write(path, content, facts)
        found, others = gguf_file.read(path, model)
        for name, one in coded.items():
            same(name, found[name], one)
        for name, tensor in others.items():
            if not equal(tensor, state[name].float()):
                raise RuntimeError(f"{name}: the file does not hold the tensor that was written")
        read = {"level": 0, "matrices": len(coded), "tensors": len(found) + len(others)}
        facts["verified"] = [read]
        _verify(source, path, GGUF, coded, None, facts, options)
    log.info("%s: use it as model=local model.path=%s", out, out)
    return facts


def read_back(
    folder: Path,
    format: str,
    section: Mapping[str, Any] | None,
    state: Mapping[str, Tensor],
    coded: Mapping[str, Packed],
) -> dict[str, Any]:
    """The fact that a folder holds these tensors and, read as a checkpoint of others is, these
    codes. RuntimeError for a difference, which is a bug of a writer or a reader."""
    where = str(folder)
    written = code_formats.tensors(sorted(folder.glob("*.safetensors")), where)
    for name in written:
        if name in state and not equal(written[name], state[name]):
            raise RuntimeError(f"{name}: the file does not hold the tensor that was written")
    if section is not None:
        kept = {state[name].data_ptr() for name in written if name in state}
        for name in state.keys() - written.keys():
            if state[name].data_ptr() not in kept:  # a tied head is written once
                raise RuntimeError(f"{name}: is not in the file")
        found, _, _ = code_formats.separate(written, FORMATS[format], section, where)
        if found.keys() != coded.keys():
            raise RuntimeError(f"{folder}: other linears are coded than in the run")
        for name, one in coded.items():
            assert isinstance(one, Coded)
            same(name, found[name], one)
    return {"level": 0, "matrices": len(coded), "tensors": len(written)}


def same(name: str, found: Coded, coded: Coded) -> None:
    """RuntimeError unless two stored forms have equal scales, codes relative to zero and values."""
    one, other = found.per_column(), coded.per_column()
    if not (
        torch.equal(one.scale, other.scale)
        and torch.equal(found.codes - one.zero, coded.codes - other.zero)
        and torch.equal(found.dequantize(), coded.dequantize())
    ):
        raise RuntimeError(f"{name}: the exported matrix is not that of the run")


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same bits."""
    same_form = one.dtype == other.dtype and one.shape == other.shape
    raw = (each.contiguous().reshape(-1).view(torch.uint8) for each in (one, other))
    return same_form and torch.equal(*raw)


def _add_section(folder: Path, format: str, section: Mapping[str, Any] | None) -> None:
    if section is None:
        return
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config[SECTION.get(format, "quantization_config")] = section
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if format == "gptq":  # where tools older than this key of config.json look
        (folder / "quantize_config.json").write_text(json.dumps(section, indent=2) + "\n")


def fits(run: Path) -> dict[str, str]:
    """A sentence on every format: what it stores of this run, or why it cannot hold it."""
    source = ExportedRun.read(run)
    found = {name: _fit(source, name) for name in FORMATS}
    return found | {GGUF: source.gguf_fit(), FLOAT: source.float_fit()}


def _fit(source: ExportedRun, format: str) -> str:
    try:
        coded = source.coded(FORMATS[format].refusal)
        state, _ = source.with_codes(FORMATS[format], coded)
    except UserError as error:
        return f"no: {error}"
    note = model_card.note(format, coded)
    return f"exact, {source.bits(state, coded):.2f} bits a weight{f'; {note}' if note else ''}"
