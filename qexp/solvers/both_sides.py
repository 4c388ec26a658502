"""The Hessians of a layer's inputs and outputs as one tensor, as sources hand them out."""

import torch
from jaxtyping import Float
from torch import Tensor


def joined(
    inputs: Float[Tensor, "columns columns"], outputs: Float[Tensor, "rows rows"]
) -> Float[Tensor, " both"]:
    """Both Hessians, flattened, one after the other."""
    return torch.cat([inputs.flatten(), outputs.flatten()])


def sides(
    both: Float[Tensor, " both"], columns: int
) -> tuple[Float[Tensor, "columns columns"], Float[Tensor, "rows rows"]]:
    """The inverse of `joined`, as views."""
    rest = both[columns**2 :]
    rows = round(len(rest) ** 0.5)
    return both[: columns**2].view(columns, columns), rest.view(rows, rows)
