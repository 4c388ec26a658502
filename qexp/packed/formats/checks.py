"""Checks of matrices before they are written and of tensors that were read."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qexp.grid import BlockGrid, IntGrid, LevelGrid
from qexp.packed.base import Packed
from qexp.packed.coded import Coded


class Unreadable(ValueError):
    """Tensors of a file that are not those of the format; the message follows a linear's name."""


def coded_refusal(packed: Packed) -> str | None:
    """Why no format of codes holds a matrix; None where one may. The sentence begins with a key."""
    if not isinstance(packed, Coded):
        return (
            f"method: its matrices are stored as {type(packed).__name__}, not as one code and one "
            "scale for each weight"
        )
    if packed.outliers is not None:
        return "method: it keeps outliers in floating point, next to the codes"
    if isinstance(packed.scale, Coded) or isinstance(packed.zero, Coded):
        return "weight.scales, weight.zeros: scales are quantized a second time"
    return None


def integer_refusal(coded: Coded, bits: tuple[int, ...], group: bool = False) -> str | None:
    """Why a format of integers of these widths cannot hold a matrix. group: the format holds the
    index of each column's group."""
    grid = coded.grid
    if isinstance(grid, LevelGrid):
        return f"weight.kind={grid.kind}: the format holds evenly spaced values"
    if not isinstance(grid, IntGrid | BlockGrid):
        return f"weight.levels={grid.top + 1}: the format holds 2^bits values around a zero point"
    if grid.bits not in bits:
        widths = ", ".join(map(str, bits))
        return f"weight.bits={grid.bits}: the format holds {widths} bits"
    zero = coded.scales().zero
    if not torch.equal(zero, zero.round()) or bool((zero < 0).any() | (zero > grid.top).any()):
        return "weight.real_zero=true: the format holds zero points that are codes"
    if coded.group is not None and not group:
        return (
            "method.solver.static_groups=false: with act_order the groups are not neighbours, "
            "which format=gptq alone holds"
        )
    return None


def exact_refusal(scale: Tensor, dtype: torch.dtype) -> str | None:
    """Why scales cannot be stored in `dtype`: a value is not one of its own."""
    if torch.equal(scale.to(dtype).float(), scale.float()):
        return None
    name = str(dtype).removeprefix("torch.")
    return f"weight.scale_dtype: a scale is no {name} value, in which the format stores it"


def rowwise(coded: Coded) -> tuple[Float[Tensor, "rows groups"], Float[Tensor, "rows groups"]]:
    """Scales and zero points with one row per row of the matrix, also of a grid with one scale."""
    scales, rows = coded.scales(), coded.shape[0]
    scale, zero = (part.expand(rows, -1).contiguous() for part in (scales.scale, scales.zero))
    return scale, zero


def widened(coded: Coded) -> Coded:
    """Asymmetric codes with whole zero points as symmetric ones of one bit more: code - zero is
    unchanged. Others as they are."""
    grid = coded.grid
    if coded.zero is None or not isinstance(grid, IntGrid) or grid.real_zero:
        return coded
    codes = coded.codes - coded.per_column().zero.int() + 2**grid.bits
    wider = replace(grid, bits=grid.bits + 1, symmetric=True)
    return replace(coded, grid=wider, codes=codes, zero=None)


def part(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """A tensor of a linear by the end of its name. Unreadable where it is missing."""
    if name not in tensors:
        raise Unreadable(f"has no {name}")
    return tensors[name]


def shaped(tensors: Mapping[str, Tensor], name: str, *shapes: tuple[int, ...]) -> Tensor:
    """The tensor `name`. Unreadable unless its shape is one of these."""
    tensor = part(tensors, name)
    if tuple(tensor.shape) not in shapes:
        right = " or ".join(str(list(shape)) for shape in shapes)
        raise Unreadable(f"{name} has the shape {list(tensor.shape)}, not {right}")
    return tensor


def of_integers(
    bits: int,
    codes: Int[Tensor, "rows columns"],
    scale: Float[Tensor, "rows groups"],
    zero: Float[Tensor, "rows groups"] | Int[Tensor, "rows groups"] | None,
    group: Int[Tensor, " columns"] | None = None,
) -> Coded:
    """The stored form of what a file holds. zero: None is 2^(bits-1).

    Scales may be negative: AutoRound and llama.cpp keep the sign of a group's extreme value.
    Unreadable for groups that do not divide the columns, codes or zero points out of range, and
    scales that are not finite.
    """
    columns, top = codes.shape[1], 2**bits - 1
    groups = scale.shape[1]
    if group is None and columns % groups:
        raise Unreadable(f"has {groups} groups, which do not divide its {columns} columns")
    if group is not None and (len(group) != columns or int(group.max()) >= groups):
        raise Unreadable(f"names groups beyond its {groups}, or not one for each of its columns")
    if not bool(torch.isfinite(scale).all()):
        raise Unreadable("has scales that are not finite")
    for name, values in (("codes", codes), ("zero points", zero)):
        if values is not None and bool((values < 0).any() | (values > top).any()):
            raise Unreadable(f"has {name} outside of 0 … {top}, which {bits} bits hold")
    dtype = str(scale.dtype).removeprefix("torch.")
    size = columns // groups if group is None and groups > 1 else None
    grid = IntGrid(bits, symmetric=zero is None, group_size=size, scale_dtype=dtype)
    return Coded(grid, codes.int(), scale.float(), None if zero is None else zero.float(), group)
