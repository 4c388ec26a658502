"""Model folders whose linears hold codes: the formats, and reading their tensors."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qexp.common.errors import UserError, first_line
from qexp.packed.coded import Coded
from qexp.packed.formats import awq, compressed_tensors, gptq, mlx, nf4
from qexp.packed.formats.checks import Unreadable


class CodeFormat(Protocol):
    """A module of `qexp.packed.formats`."""

    @property
    def METHOD(self) -> str:
        """`quant_method` of config.json."""

    @property
    def MARKS(self) -> tuple[str, ...]:
        """Ends of tensor names that a float linear does not have."""

    @property
    def PARTS(self) -> tuple[str, ...]:
        """Ends of all tensor names of a linear, the bias excepted."""

    @property
    def refusal(self) -> Callable[[Coded], str | None]:
        """Why the format cannot hold a matrix, beginning with the run's key; None if it can."""

    @property
    def write(self) -> Callable[..., dict[str, Tensor]]:
        """The tensors of one linear by the ends of their names."""

    @property
    def config(self) -> Callable[..., dict[str, Any]]:
        """The section of config.json for matrices by name and the names of float linears."""

    @property
    def read(self) -> Callable[[Mapping[str, Tensor], Mapping[str, Any], str], Coded]:
        """The inverse of `write`, of the section of config.json and the linear's name."""


FORMATS: dict[str, CodeFormat] = {  # in the order of recommendation
    "compressed_tensors": compressed_tensors,
    "gptq": gptq,
    "awq": awq,
    "mlx": mlx,
    "nf4": nf4,
}
SECTION = {"mlx": "quantization"}  # of config.json; quantization_config for all others


def section(config: Mapping[str, Any], where: str) -> tuple[CodeFormat, dict[str, Any]] | None:
    """The format of a checkpoint and its section of config.json; None for a float one. UserError
    for a format that cannot be read. where: the config key and value, for the message."""
    stored = config.get("quantization_config")
    if stored is None or "quant_method" not in stored:
        own = config.get(SECTION["mlx"]) or stored
        return None if not own else (mlx, dict(own))
    method = stored["quant_method"]
    for name, format in FORMATS.items():
        if method == format.METHOD and name not in SECTION:
            return format, dict(stored)
    known = ", ".join(format.METHOD for format in FORMATS.values())
    raise UserError(
        f"{where}: the checkpoint is already quantized by {method}, which is not read ({known} "
        "are); choose another form of it or the float checkpoint"
    )


def tensors(paths: Sequence[Path], where: str) -> dict[str, Tensor]:
    """All tensors of safetensors files. UserError for a damaged one."""
    found: dict[str, Tensor] = {}
    for path in paths:
        try:
            found |= load_file(path)
        except (OSError, SafetensorError, ValueError) as error:
            raise UserError(
                f"{where}: {path.name} is truncated or no safetensors file ({first_line(error)})"
            ) from error
    return found


def separate(
    state: Mapping[str, Tensor], format: CodeFormat, config: Mapping[str, Any], where: str
) -> tuple[dict[str, Coded], dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """The coded linears of a checkpoint, its other tensors, and what a format stores of a linear in
    addition (`input_scale`). UserError with the linear's name for tensors that are not those of the
    format. config: the section of config.json."""
    linears: dict[str, dict[str, Tensor]] = {}
    for key in state:
        for mark in format.MARKS:
            if key.endswith(f".{mark}"):
                linears.setdefault(key.removesuffix(f".{mark}"), {})
    if not linears:
        raise UserError(
            f"{where}: config.json says {format.METHOD}, and no linear has {format.MARKS[0]}"
        )
    others = dict(state)
    for name, parts in linears.items():
        for part in format.PARTS:
            if f"{name}.{part}" in others:
                parts[part] = others.pop(f"{name}.{part}")
    matrices = {}
    for name, parts in linears.items():
        try:
            matrices[name] = format.read(parts, config, name)
        except Unreadable as error:
            raise UserError(f"{where}: {name} {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{where}: config.json or {name} is not as {format.METHOD} has it "
                f"({type(error).__name__}: {first_line(error)})"
            ) from error
    return matrices, others, linears
