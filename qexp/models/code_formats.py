"""Model folders whose linears hold codes: the formats, and reading their tensors."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qexp.common.errors import UserError, first_line
from qexp.common.lazily import Lazily
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


def tensors(paths: Sequence[Path], where: str) -> Mapping[str, Tensor]:
    """All tensors of safetensors files, each read when it is asked for. UserError for a damaged
    file."""
    place: dict[str, Path] = {}
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                place |= dict.fromkeys(file.keys(), path)
        except (OSError, SafetensorError, ValueError) as error:
            raise UserError(
                f"{where}: {path.name} is truncated or no safetensors file ({first_line(error)})"
            ) from error

    def read(name: str) -> Tensor:
        with safe_open(place[name], "pt", backend="pread") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    return Lazily(place, read)


def separate(
    state: Mapping[str, Tensor], format: CodeFormat, config: Mapping[str, Any], where: str
) -> tuple[Mapping[str, Coded], Mapping[str, Tensor], Mapping[str, Mapping[str, Tensor]]]:
    """The coded linears of a checkpoint, its other tensors, and all that a format stores of a
    linear (`input_scale` too), each read when it is asked for; then UserError with the linear's
    name for tensors that are not those of the format. config: the section of config.json."""
    linears: dict[str, list[str]] = {}
    for key in state:
        for mark in format.MARKS:
            if key.endswith(f".{mark}"):
                linears.setdefault(key.removesuffix(f".{mark}"), [])
    if not linears:
        raise UserError(
            f"{where}: config.json says {format.METHOD}, and no linear has {format.MARKS[0]}"
        )
    others = dict.fromkeys(state)
    for name, found in linears.items():
        for part in format.PARTS:
            if f"{name}.{part}" in others:
                del others[f"{name}.{part}"]
                found.append(part)

    def parts(name: str) -> Mapping[str, Tensor]:
        return Lazily(linears[name], lambda part: state[f"{name}.{part}"])

    def matrix(name: str) -> Coded:
        try:
            return format.read(parts(name), config, name)
        except Unreadable as error:
            raise UserError(f"{where}: {name} {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{where}: config.json or {name} is not as {format.METHOD} has it "
                f"({type(error).__name__}: {first_line(error)})"
            ) from error

    return Lazily(linears, matrix), Lazily(others, state.__getitem__), Lazily(linears, parts)
