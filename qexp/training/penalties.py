"""Penalty on activation outliers in the style of QuantTune (2403.06497).

The paper's formula was not available. This one follows the abstract; every choice is a field.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qexp.common.errors import FieldError, UserError, check_finite, check_range
from qexp.grid import IntGrid
from qexp.grid.outlier_error import Moments, decompose
from qexp.quantizers.placement import Placement, Site
from qexp.task import Task
from qexp.training.fsdp import mean_over_ranks
from qexp.training.losses import Penalty, Watch

RANKED = IntGrid(8, per_tensor=True)  # for ranking tensors by their error


class Found(NamedTuple):
    """The penalty of one tensor and its gradient at the indices `where`; it is zero elsewhere."""

    value: Float[Tensor, ""]
    where: Int[Tensor, " some"]
    gradient: Float[Tensor, " some"]


@dataclass(frozen=True)
class Form(ABC):
    """The excess of a tensor's values over `k` standard deviations, to the `power`, in units of a
    standard deviation (`normalized`) or of the tensor. Mean and deviation have no gradient."""

    k: float | int = 3.0
    power: float | int = 2
    normalized: bool = True

    @abstractmethod
    def __call__(
        self, x: Float[Tensor, " values"], mean: Float[Tensor, ""], deviation: Float[Tensor, ""]
    ) -> Found: ...


@dataclass(frozen=True)
class Deviation(Form):
    """The mean over outliers of (|x - mean| - k deviation)^power."""

    def __call__(
        self, x: Float[Tensor, " values"], mean: Float[Tensor, ""], deviation: Float[Tensor, ""]
    ) -> Found:
        threshold = self.k * deviation
        unit = deviation if self.normalized else torch.ones_like(deviation)
        index = _near_outliers(x, mean, threshold)
        centred = x.index_select(0, index) - mean
        excess = (centred.abs() - threshold).clamp(min=0) / unit
        outside = centred.sign() * (excess > 0)
        count = outside.abs().sum().clamp(min=1)
        slope = excess.pow(self.power - 1) * outside * (self.power / unit / count)
        return Found(excess.pow(self.power).sum() / count, index, slope)


def _near_outliers(
    x: Float[Tensor, " values"], mean: Float[Tensor, ""], limit: Float[Tensor, ""], rows: int = 8
) -> Int[Tensor, " some"]:
    """Indices of all values further than `limit` from the mean, and of others in their columns when
    x is viewed as `rows` rows. A comparison per column takes a third of the time of one per value.
    """
    columns = len(x) // rows
    folded = x[: rows * columns].view(rows, columns)
    far = torch.maximum(folded.amax(0) - mean, mean - folded.amin(0)) > limit
    starts = torch.arange(rows, device=x.device)[:, None] * columns
    rest = torch.arange(rows * columns, len(x), device=x.device)
    return torch.cat([(starts + far.nonzero().flatten()).flatten(), rest])


@dataclass(frozen=True)
class Span(Form):
    """(max - min - 2 k deviation)₊^power, which penalizes the range."""

    def __call__(
        self, x: Float[Tensor, " values"], mean: Float[Tensor, ""], deviation: Float[Tensor, ""]
    ) -> Found:
        unit = deviation if self.normalized else torch.ones_like(deviation)
        index = torch.stack([x.argmax(), x.argmin()])
        high, low = x[index]
        excess = (high - low - 2 * self.k * deviation).clamp(min=0) / unit
        slope = self.power * excess.pow(self.power - 1) * (excess > 0) / unit
        return Found(excess.pow(self.power), index, torch.stack([slope, -slope]))


@dataclass(frozen=True)
class NoPenalty(Penalty):
    """No penalty."""

    @contextmanager
    def watch(self, task: Task) -> Iterator[Watch]:
        yield Idle()


@dataclass(frozen=True)
class Outliers(Penalty):
    """λ times the mean of `form` over the tensors of `placement` that match a pattern in `sites`.

    λ is `weight`; if that is null, λ is fixed at the first step so that the penalty is `share` of
    the loss. momentum: of the running mean and deviation of each tensor. worst: the share of
    tensors that are penalized; they are those with the largest part of their 8-bit error due to
    outliers at the first step. With λ = 0 no hooks are registered.
    """

    form: Form
    placement: Placement
    share: float | int | None = 0.1
    weight: float | int | None = None
    momentum: float | int = 0.9
    sites: Sequence[str] = ("*",)
    worst: float | int = 1.0

    def __post_init__(self) -> None:
        if (self.share is None) == (self.weight is None):
            raise FieldError("share and weight: give one of them, and null for the other.")
        check_finite(None, self, "share" if self.weight is None else "weight")
        check_range(None, self, "a number above 0 and at most 1", lambda x: 0 < x <= 1, "worst")
        check_range(None, self, "a number from 0 to below 1", lambda x: 0 <= x < 1, "momentum")

    @contextmanager
    def watch(self, task: Task) -> Iterator[Watch]:
        if not (self.share or self.weight):
            yield Idle()
            return
        chosen = [
            site
            for site in self.placement.sites(task)
            if any(fnmatch(site.name, pattern) for pattern in self.sites)
        ]
        if not chosen:
            raise UserError(f"method.penalty.sites: {list(self.sites)} matches no tensor")
        watch = Watching(self, chosen)
        handles = [site.watch(watch.see(site.name)) for site in chosen]
        try:
            yield watch
        finally:
            for handle in handles:
                handle.remove()


class Idle(Watch):
    def take(self, loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
        return loss.new_zeros(())


class Watching(Watch):
    """Hooks store one entry per tensor, which is overwritten if backward recomputes a block; `take`
    moves the state that later steps need to `memory`."""

    def __init__(self, penalty: Outliers, sites: Sequence[Site]) -> None:
        self.penalty = penalty
        self.memory: dict[str, Any] = {"statistics": {}, "kept": [site.name for site in sites]}
        self.values: dict[str, Tensor] = {}
        self.statistics: dict[str, tuple[Tensor, Tensor]] = {}
        self.shares: dict[str, float] = {}

    @property
    def notes(self) -> dict[str, Any]:
        return self.memory

    def see(self, name: str) -> Any:
        def hook(x: Tensor) -> None:
            if torch.is_grad_enabled() and name in self.memory["kept"]:
                self._measure(name, x)

        return hook

    def take(self, loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
        if not torch.is_grad_enabled():  # validation compares losses without penalty
            return loss.new_zeros(())
        if self.statistics:  # averaged over processes, whose batches differ
            rows = mean_over_ranks(
                torch.stack([torch.stack(pair) for pair in self.statistics.values()])
            )
            pairs = ((mean, deviation) for mean, deviation in rows.unbind())
            self.memory["statistics"] = dict(zip(self.statistics, pairs, strict=True))
        if self.shares:
            count = math.ceil(self.penalty.worst * len(self.shares))
            means = mean_over_ranks(torch.tensor([*self.shares.values()], device=loss.device))
            shares = dict(zip(self.shares, means.tolist(), strict=True))
            ranked = sorted(shares, key=shares.__getitem__, reverse=True)
            self.memory["kept"], self.shares = ranked[:count], {}
        values = [self.values[name].to(loss.device) for name in self.memory["kept"]]
        self.values = {}
        value = torch.stack(values).mean()
        return self._weight(loss, value) * value

    def _weight(self, loss: Tensor, value: Tensor) -> float:
        if self.penalty.weight is not None:
            return float(self.penalty.weight)
        assert self.penalty.share is not None
        if "weight" not in self.memory:
            both = torch.stack([loss.detach().float(), value.detach().float()])
            mean_loss, mean_value = mean_over_ranks(both)
            if mean_value > 0:
                self.memory["weight"] = float(self.penalty.share * mean_loss / mean_value)
        return float(self.memory.get("weight", 0.0))

    def _measure(self, name: str, x: Tensor) -> None:
        flat = x.detach().flatten().float()
        mean = flat.mean()
        # One pass, limited by memory bandwidth. E[x²] - E[x]² is accurate enough here, because the
        # mean of an activation is not large compared with its deviation.
        deviation = (flat.dot(flat) / len(flat) - mean.square()).clamp(min=0).sqrt()
        deviation = deviation.clamp(min=torch.finfo(torch.float32).tiny ** 0.5)
        if (before := self.memory["statistics"].get(name)) is not None:
            share = 1 - self.penalty.momentum
            mean, deviation = (
                old.to(new).lerp(new, share)
                for old, new in zip(before, (mean, deviation), strict=True)
            )
        elif self.penalty.worst < 1:
            moments = Moments()
            moments.add(flat)
            self.shares[name] = decompose(flat, moments, RANKED, float(self.penalty.form.k)).share
        self.statistics[name] = (mean, deviation)
        self.values[name] = _Sparse.apply(x, self.penalty.form(flat, mean, deviation))


class _Sparse(torch.autograd.Function):
    """A value with a precomputed sparse gradient. No tensors are saved for backward, so that it
    works with recomputed blocks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, found: Found) -> Tensor:
        ctx.found, ctx.like = found, (x.shape, x.dtype)
        return found.value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        shape, dtype = ctx.like
        gradient = (ctx.found.gradient * grads[0]).to(dtype)
        dense = torch.zeros(shape, dtype=dtype, device=gradient.device)
        dense.view(-1).index_copy_(0, ctx.found.where, gradient)
        return dense, None
