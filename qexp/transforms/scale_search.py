"""Search for the best channel scale and shift of every site, block by block."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import inf
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.common import on_disk
from qexp.common.errors import UserError, check_int
from qexp.grid import Grid
from qexp.quantizers.scheme import Activations
from qexp.task import Batch, Task
from qexp.transforms.channels import channels_of
from qexp.transforms.input_moments import InputMoments, input_moments
from qexp.transforms.site_collection import collect_statistics
from qexp.transforms.site_statistics import ScaleShift, SiteStatistics
from qexp.walk import Block, walk
from qexp.walk.capture import rows, split

PIECES = 32  # in which a search sees the calibration data


@torch.no_grad()
def search_and_fold(
    task: Task,
    batches: Sequence[Batch],
    sites: str,
    propose: Callable[[SiteStatistics], list[ScaleShift]],
    grid: Grid,
    activation: Activations,
    searched: bool,
    margin: float = inf,
    finish: Callable[[Block, InputMoments], None] | None = None,
) -> None:
    """Folds, at each site of each block, the best change that `propose` returns.

    searched: whether `propose` may return several. margin: of `race.least`, whose parts are the
    batches. finish: called with each block after its last site, and the moments of its inputs, from
    which the errors of single linears are then computed too; for changes without a shift, and float
    activations. What it changes does not reach the next block.
    """
    measured = finish is not None
    for block in walk(task, batches, divide=True):
        channels = channels_of(task, block.index, sites)
        with input_moments(block, block.groups if measured else ()) as moments:
            statistics = collect_statistics(block, channels, searched, measured)
        with on_device(block):
            for site in statistics:
                first = site.channels.linears[0]
                site.moment = moments.get(first) if site.is_linear else None
                change = site.best(propose(site), grid, activation, margin)
                site.channels.fold(change.scale, change.shift)
                if first in moments:
                    scale = site.channels.spread(change.scale)
                    moments[first].div_(scale).div_(scale[:, None])
            if finish is not None:
                finish(block, moments)


@contextmanager
def on_device(block: Block) -> Iterator[None]:
    """Moves the block to the task's device for the context, so that its parts can be called."""
    home = next(block.module.parameters()).device
    on_disk.move(block.module, block.task.device)
    try:
        yield
    finally:
        on_disk.move(block.module, home)


def first(batches: Iterable[Batch], sequences: int | None) -> list[Batch]:
    """The first `sequences` sequences of each batch; all if None."""
    return [{key: value[:sequences] for key, value in batch.items()} for batch in batches]


def pieces(batches: Sequence[Batch]) -> list[Batch]:
    """The same sequences in order, a thirty-second of them or less in each batch."""
    each = -(-sum(map(rows, batches)) // PIECES) if batches else 1
    return [part for batch in batches for part in split(batch, max(each, 1))]


def smoothed(
    inputs: Float[Tensor, " channels"], weights: Float[Tensor, " channels"], alpha: float
) -> Float[Tensor, " channels"]:
    """The scale for channels whose inputs and weights reach so far; 1 where either is dead."""
    scale = inputs.pow(alpha) / weights.pow(1 - alpha)
    return torch.where((inputs > 0) & (weights > 0), scale.clamp(1e-5, 1e5), 1.0)


def check_settings(settings: Any) -> None:
    """UserError unless a transform's `grid` is one, and `sequences` are all or at least 1."""
    if not isinstance(settings.grid, Grid):
        raise UserError(
            f"transform.grid={settings.grid}: a grid is needed here; leave transform.grid out and "
            "choose one for weights, for example weight=int."
        )
    if settings.sequences is not None:
        check_int("transform", settings, sequences=1)
