"""Export of a finished run's model: a folder of float weights or of codes, read back before it
appears."""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qexp.common.errors import UserError
from qexp.common.files import atomic, atomic_folder
from qexp.models import code_formats, gguf_file, model_card
from qexp.models.code_formats import FORMATS, SECTION
from qexp.models.exported_run import ExportedRun
from qexp.models.linearize import published
from qexp.packed.coded import Coded
from qexp.packed.formats import gguf as blocks
from qexp.runs.results import write_json

log = logging.getLogger(__name__)

FLOAT, GGUF = "float", "gguf"
Verify = Callable[[Path], dict[str, Any]]


def check(out: Path) -> None:
    """UserError where `out` exists and is not an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: already exists; name another folder, or delete it")


def export(
    run: Path, out: Path, format: str = FLOAT, verify: Verify | None = None
) -> dict[str, Any]:
    """Write the model and the tokenizer of a finished run atomically, as transformers and
    `model=local model.path=OUT` read them; the facts in `qexp.json`.

    format: `float`, or a key of FORMATS, whose codes are those of the run. The folder is read back
    and compared, every matrix and every float tensor, and `verify` may measure it, before it
    appears. Raises UserError for what the format cannot hold: with the run's key in a format of
    codes; activation quantizers and parameters that the family does not have in a float one.
    """
    check(out)
    source = ExportedRun.read(run)
    if format == GGUF:
        return _gguf(source, out, verify)
    if format == FLOAT:
        source.refuse_activations()
        state, section, coded = published(source.model), None, dict[str, Coded]()
    else:
        coded = source.coded(FORMATS[format].refusal)
        state, section = source.with_codes(FORMATS[format], coded)
    kept = dict(state)  # save_pretrained empties the dict
    with atomic_folder(out) as folder:
        source.model.save_pretrained(folder, state_dict=state)
        for path in folder.glob("*.safetensors"):
            path.chmod((folder / "config.json").stat().st_mode)  # its writer makes it private
        _add_section(folder, format, section)
        if source.tokenizer is not None:
            source.tokenizer.save_pretrained(folder)
        facts = source.facts(format) | {"bits": source.bits(kept, coded)}
        facts["verified"] = [read_back(folder, format, section, kept, coded)]
        if verify is not None:
            _measured(facts, verify(folder))
        write_json(folder / "qexp.json", facts)
        card = model_card.text(source, facts, coded)
        (folder / "README.md").write_text(card, encoding="utf-8")
    log.info("%s: use it as model=local model.path=%s", out, out)
    return facts


def _measured(facts: dict[str, Any], found: Mapping[str, Any]) -> None:
    """Add what was measured from the export to the facts: verification of level 2."""
    facts |= found
    facts["verified"].append({"level": 2, "metrics": sorted(found["measured"])})


def _gguf(source: ExportedRun, out: Path, verify: Verify | None) -> dict[str, Any]:
    """A single file, whose key `qexp.facts` is what `qexp.json` is in a folder."""
    if out.suffix != f".{GGUF}":
        raise UserError(f"{out}: format=gguf writes one file, whose name ends with .gguf")
    source.refuse_activations()
    coded, origin = source.coded(blocks.refusal), source.gguf_origin()
    model, facts = source.model, source.facts(GGUF)
    state = published(model)
    facts["containers"], facts["bits"] = gguf_file.summary(model, source.tokenizer, coded, origin)
    with atomic(out) as path:
        gguf_file.write(path, model, source.tokenizer, coded, origin, facts)
        found, others = gguf_file.read(path, model)
        for name, one in coded.items():
            same(name, found[name], one)
        for name, tensor in others.items():
            if not equal(tensor, state[name].float()):
                raise RuntimeError(f"{name}: the file does not hold the tensor that was written")
        read = {"level": 0, "matrices": len(coded), "tensors": len(found) + len(others)}
        facts["verified"] = [read]
        if verify is not None:
            _measured(facts, verify(path))
    log.info("%s: use it as model=local model.path=%s", out, out)
    return facts


def read_back(
    folder: Path,
    format: str,
    section: Mapping[str, Any] | None,
    state: Mapping[str, Tensor],
    coded: Mapping[str, Coded],
) -> dict[str, Any]:
    """The fact that a folder holds these tensors and, read as a checkpoint of others is, these
    codes. RuntimeError for a difference, which is a bug of a writer or a reader."""
    where = str(folder)
    written = code_formats.tensors(sorted(folder.glob("*.safetensors")), where)
    for name, tensor in state.items():
        if name in written and not equal(written[name], tensor):
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
