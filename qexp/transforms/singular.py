"""Trained increments of the singular values of a weight matrix (LSI)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qexp.common.on_disk import assign
from qexp.transforms.channels import parametrized
from qexp.transforms.reconstruction import Changed


class Singular(nn.Module):
    """W + U diag(d) Vᵀ with the singular vectors of W, and d zeros at the start (learnable singular
    value increment, 2407.15508). square: side k of a matrix that trains too, with zeros at the
    start, in the corner of the k largest singular values."""

    def __init__(self, linear: nn.Linear, square: int = 0) -> None:
        super().__init__()
        self.linear = (linear,)  # not as a submodule
        left, values, right = torch.linalg.svd(linear.weight.detach().float(), full_matrices=False)
        self.register_buffer("left", left, persistent=False)
        self.register_buffer("right", right, persistent=False)
        self.increment = nn.Parameter(torch.zeros_like(values))
        side = min(square, len(values))
        self.corner = nn.Parameter(values.new_zeros(side, side)) if side else None

    def change(self, weight: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        left, right = self.get_buffer("left"), self.get_buffer("right")
        added = left * self.increment @ right
        if self.corner is not None:
            side = len(self.corner)
            added = added + left[:, :side] @ self.corner @ right[:side]
        return weight + added

    @contextmanager
    def live(self) -> Iterator[None]:
        with parametrized(self.linear[0], "weight", Changed(self.change)):
            yield

    @torch.no_grad()
    def fold(self) -> None:
        weight = self.linear[0].weight
        assign(weight, self.change(weight.data).to(weight))
