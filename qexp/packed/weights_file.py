"""File of quantized weights: bit-packed codes and scales, written and read."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qexp.common.errors import UserError
from qexp.common.files import atomic
from qexp.common.lazily import Lazily
from qexp.packed.base import Packed
from qexp.packed.binary import Binary
from qexp.packed.coded import Coded
from qexp.packed.low_rank import LowRank
from qexp.packed.masked import Masked
from qexp.packed.mixed import Partial
from qexp.packed.parts import Parts
from qexp.packed.plain import Plain
from qexp.packed.rotated import Rotated
from qexp.packed.stacked import Stacked
from qexp.packed.table import Table
from qexp.runs import results

FILE = results.WEIGHTS
OTHER = "other:"
# Named here so that `restored` finds every form: it knows the classes that were imported.
FORMS: dict[str, type[Packed]] = {
    form.__name__: form
    for form in (Binary, Coded, LowRank, Masked, Partial, Parts, Plain, Rotated, Stacked, Table)
}


def save(
    folder: Path,
    weights: Mapping[str, Packed],
    others: Mapping[str, Tensor],
    maps: Mapping[str, Any] | None = None,
) -> None:
    """Write `weights.safetensors` atomically.

    weights: stored forms by name of the linear. others: further tensors that the run changed or
    created (ranges of static activation quantizers), by their names. maps: JSON values that
    describe online maps, whose matrices are among the others.
    """
    tensors, layout = flatten(weights)
    tensors |= {f"{OTHER}{name}": tensor.contiguous().cpu() for name, tensor in others.items()}
    with atomic(folder / FILE) as path:
        own = {"layout": json.dumps(layout)} | ({"maps": json.dumps(maps)} if maps else {})
        save_file(tensors, path, metadata=own)


def load(folder: Path) -> tuple[Mapping[str, Packed], dict[str, Tensor]]:
    """The inverse of `save`; each stored form is read when it is asked for. Raises UserError when
    the file is absent or damaged."""
    path = folder / FILE
    try:
        with safe_open(path, "pt", backend="pread") as file:
            layout = json.loads(file.metadata()["layout"])
            names = [key for key in file.keys() if key.startswith(OTHER)]  # noqa: SIM118
            others = {key.removeprefix(OTHER): file.get_tensor(key) for key in names}
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): run the configuration again with save_weights=true."
        ) from error
    return Lazily(layout, partial(_read, path, layout)), others


def _read(path: Path, layout: Mapping[str, Any], name: str) -> Packed:
    with safe_open(path, "pt", backend="pread") as file:
        parts = [key for key in file.keys() if key.startswith(f"{name}:")]  # noqa: SIM118
        stored = {key.partition(":")[2]: file.get_tensor(key) for key in parts}
    return FORMS[layout[name]["form"]].restore(stored, layout[name])


def maps(folder: Path) -> dict[str, Any]:
    """What `save` was told of online maps; empty where the file has none."""
    with safe_open(folder / FILE, "pt") as file:
        described: dict[str, Any] = json.loads(file.metadata().get("maps", "{}"))
    return described


def flatten(weights: Mapping[str, Packed]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Stored forms as one dict of tensors, and the layout (JSON values) needed to read it."""
    tensors, layout = {}, {}
    for name, packed in weights.items():
        layout[name] = packed.described()
        for key, tensor in packed.stored().items():
            tensors[f"{name}:{key}"] = tensor.contiguous().cpu()
    return tensors, layout


def unflatten(tensors: Mapping[str, Tensor], layout: Mapping[str, Any]) -> dict[str, Packed]:
    """The inverse of `flatten`; tensors that the layout does not name are ignored."""
    stored: dict[str, dict[str, Tensor]] = {name: {} for name in layout}
    for key, tensor in tensors.items():
        name, _, part = key.partition(":")
        if name in stored:
            stored[name][part] = tensor
    return {name: FORMS[form["form"]].restore(stored[name], form) for name, form in layout.items()}
