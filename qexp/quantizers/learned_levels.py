"""Levels of activation quantizers, fitted to calibration data by the loss's gradients."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qexp.common.frozen import frozen
from qexp.common.progress import bar
from qexp.grid.codebook import CodebookGrid
from qexp.quantizers.activation import FakeQuant
from qexp.quantizers.attention import as_decoded
from qexp.task import Batch, Task

BINS = 2**12  # of the positions in [-1, 1]


class Positions:
    """A histogram of the positions of a quantizer's values in [-1, 1], their intervals.

    counts: how many values; mass: the sum of their squared gradients (the diagonal of the Fisher
    matrix; KVQuant, 2401.18079).
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.mass = torch.zeros(BINS, dtype=torch.float64)

    def add(self, v: Float[Tensor, "*shape"], gradient: Float[Tensor, "*shape"]) -> None:
        v, g = v.flatten().cpu(), gradient.flatten().double().cpu()
        inside = v.abs() <= 1
        at = ((v[inside] + 1) * (BINS / 2)).long().clamp(max=BINS - 1)
        self.counts += torch.bincount(at, minlength=BINS)
        self.mass += torch.bincount(at, g[inside].square(), minlength=BINS)

    def fit(self, grid: CodebookGrid) -> CodebookGrid:
        used = self.counts > 0
        values = (torch.arange(BINS, dtype=torch.float64) + 0.5) * (2 / BINS) - 1
        return grid.fitted(*(each[used][None] for each in (values, self.mass, self.counts)))


def learn_levels(task: Task, quantizers: Sequence[FakeQuant], parts: Sequence[Batch]) -> None:
    """Fit the levels of the quantizers that have a codebook, with their ranges as they are and
    every quantizer's input float."""
    learning = {q: Positions() for q in quantizers if isinstance(q.grid, CodebookGrid)}
    if not learning:
        return
    enabled = {q: q.enabled for q in task.quantizers.values() if isinstance(q, FakeQuant)}
    handles = [q.register_forward_hook(partial(_watch, found)) for q, found in learning.items()]
    for q in enabled:
        q.enabled = False
    try:
        with torch.enable_grad(), frozen(task), as_decoded(task.model):
            for part in bar(parts, "levels"):
                task.loss(part).backward()
    finally:
        for handle in handles:
            handle.remove()
        for q, was in enabled.items():
            q.enabled = was
    for q, found in learning.items():
        assert isinstance(q.grid, CodebookGrid)
        q.fix_levels(found.fit(q.grid))


def _watch(found: Positions, quantizer: nn.Module, _: Any, x: Tensor) -> Tensor:
    """The same values, whose gradients are those of the reader of rounded values alone."""
    assert isinstance(quantizer, FakeQuant)
    v = quantizer.positions(x.detach())
    seen = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
    seen.register_hook(lambda gradient: found.add(v, gradient))
    return seen
