"""File of quantized weights: bit-packed codes and scales, written and read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qexp.common.errors import UserError
from qexp.common.files import atomic
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
    tensors |= {f"other:{name}": tensor.contiguous().cpu() for name, tensor in others.items()}
    with atomic(folder / FILE) as path:
        own = {"layout": json.dumps(layout)} | ({"maps": json.dumps(maps)} if maps else {})
        save_file(tensors, path, metadata=own)


def load(folder: Path) -> tuple[dict[str, Packed], dict[str, Tensor]]:
    """The inverse of `save`. Raises UserError when the file is absent or damaged."""
    path = folder / FILE
    try:
        with safe_open(path, "pt") as file:
            layout = json.loads(file.metadata()["layout"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): run the configuration again with save_weights=true."
        ) from error
    packed = unflatten(tensors, layout)
    others = {
        key.removeprefix("other:"): tensor
        for key, tensor in tensors.items()
        if key.startswith("other:")
    }
    return packed, others


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
