"""Observers: statistics of a stream of tensors for static ranges, in bounded memory."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from qexp.common.errors import UserError

# Bins of an observed histogram. Its range doubles when a value exceeds it, so at worst half of the
# bins cover the data: a bin is 2⁻¹⁵ of the largest magnitude.
BINS = 2**16
ROW_BINS = 2**11  # of each row of a matrix


class Observer(ABC):
    in_order = False  # whether the values depend on the order of the tensors

    @abstractmethod
    def add(self, x: Float[Tensor, "..."]) -> None:
        """Observe one more tensor. Raises UserError when a value is not finite."""

    @abstractmethod
    def values(self) -> tuple[Float[Tensor, "rows size"], Float[Tensor, "rows size"] | None]:
        """Values that represent those observed, and how often each occurs (None: once each); one
        row, but for a scale of each row.

        Raises UserError when nothing was observed.
        """

    def restart(self) -> None:  # noqa: B027 (optional)
        """Forget what was observed, except what the first tensor fixed for all later ones."""

    @abstractmethod
    def merge(self, others: Sequence[Any]) -> None:
        """Take in what others observed, which were restarted after the same first tensor."""


class MinMaxObserver(Observer):
    """The lowest and the highest value of all tensors.

    momentum: if given, their moving averages; the newest tensor has the weight 1 - momentum. notes:
    both numbers, `low` and `high`.
    """

    def __init__(self, momentum: float | None = None) -> None:
        self.momentum = momentum
        self.in_order = momentum is not None
        self.notes = {"low": torch.inf, "high": -torch.inf}

    def add(self, x: Float[Tensor, "..."]) -> None:
        ends = dict(zip(("low", "high"), _bounds(x), strict=True))
        low, high = self.notes.values()
        if self.momentum is None or low > high:
            ends = {"low": min(low, ends["low"]), "high": max(high, ends["high"])}
        else:
            for key, before in self.notes.items():
                ends[key] = before + (1 - self.momentum) * (ends[key] - before)
        self.notes.update(ends)

    def merge(self, others: Sequence["MinMaxObserver"]) -> None:
        every = [self, *others]
        low, high = (min(each.notes["low"] for each in every), max(e.notes["high"] for e in every))
        self.notes.update(low=low, high=high)

    def values(self) -> tuple[Float[Tensor, "1 size"], None]:
        low, high = self.notes.values()
        _check_not_empty(low, high)
        return torch.tensor([[low, high]]), None


class RowObserver(Observer):
    """The lowest and the highest value of each row of matrices [rows, …] of equally many rows."""

    def __init__(self) -> None:
        self.ends: Float[Tensor, "rows 2"] | None = None

    def add(self, x: Float[Tensor, "..."]) -> None:
        _bounds(x)
        ends = torch.stack(x.detach().float().flatten(1).aminmax(dim=1), 1).cpu()
        if self.ends is not None:
            ends = torch.cat([self.ends, ends], 1)
        self.ends = torch.stack(ends.aminmax(dim=1), 1)

    def merge(self, others: Sequence["RowObserver"]) -> None:
        ends = [each.ends for each in (self, *others) if each.ends is not None]
        if ends:
            self.ends = torch.stack(torch.cat(ends, 1).aminmax(dim=1), 1)

    def values(self) -> tuple[Float[Tensor, "rows 2"], None]:
        if self.ends is None:
            _check_not_empty(torch.inf, -torch.inf)
        assert self.ends is not None
        return self.ends, None


class HistogramObserver(Observer):
    """A histogram. The lowest and the highest value are exact; those between them are binned."""

    def __init__(self) -> None:
        self.low, self.high, self.max_abs = torch.inf, -torch.inf, 0.0
        self.counts = torch.zeros(BINS, dtype=torch.float64)

    def add(self, x: Float[Tensor, "..."]) -> None:
        low, high = _bounds(x)
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._widen(max(abs(low), abs(high)))
        x = x.detach().float().cpu()
        self.counts += torch.histc(x, BINS, -self.max_abs, self.max_abs).double()

    def restart(self) -> None:
        self.low, self.high, self.counts = torch.inf, -torch.inf, torch.zeros_like(self.counts)

    def merge(self, others: Sequence["HistogramObserver"]) -> None:
        every = [self, *others]
        widest = max(each.max_abs for each in every)
        for each in every:
            each._widen(widest)
        self.counts = torch.stack([each.counts for each in every]).sum(0)
        self.low, self.high = min(e.low for e in every), max(e.high for e in every)

    def values(self) -> tuple[Float[Tensor, "1 size"], Float[Tensor, "1 size"]]:
        _check_not_empty(self.low, self.high)
        used = self.counts.nonzero().flatten()
        width = 2 * self.max_abs / BINS
        centers = (-self.max_abs + (used + 0.5) * width).clamp(self.low, self.high).float()
        # The outermost bins represent the bounds.
        centers[0], centers[-1] = self.low, self.high
        return centers[None], self.counts[used][None].float()

    def _widen(self, magnitude: float) -> None:
        if not self.max_abs:
            self.max_abs = max(magnitude, torch.finfo(torch.float32).tiny)
        while magnitude > self.max_abs:
            merged = self.counts.reshape(-1, 2).sum(1)
            self.counts = torch.zeros_like(self.counts)
            self.counts[BINS // 4 : BINS // 4 + len(merged)] = merged
            self.max_abs *= 2


class RowHistogramObserver(Observer):
    """A histogram of each row of matrices [rows, …] of equally many rows.

    The range of a row doubles when a value exceeds it, so at worst half of its bins cover the data.
    """

    def __init__(self) -> None:
        self.reach: Float[Tensor, "rows 1"] | None = None
        self.counts: Float[Tensor, "rows bins"] = torch.zeros(0, ROW_BINS)

    def add(self, x: Float[Tensor, "..."]) -> None:
        _bounds(x)
        rows = x.detach().float().flatten(1).cpu()
        most = rows.abs().amax(1, keepdim=True)
        if self.reach is None:
            self.reach = most.clamp(min=torch.finfo(torch.float32).tiny)
            self.counts = torch.zeros(len(rows), ROW_BINS)
        self._widen(most)
        at = ((rows / self.reach + 1) * (ROW_BINS / 2)).long().clamp(0, ROW_BINS - 1)
        self.counts.scatter_add_(1, at, torch.ones_like(rows))

    def restart(self) -> None:
        self.counts = torch.zeros_like(self.counts)

    def merge(self, others: Sequence["RowHistogramObserver"]) -> None:
        every = [each for each in (self, *others) if each.reach is not None]
        widest = torch.cat([each.reach for each in every if each.reach is not None], 1)
        for each in every:
            each._widen(widest.amax(1, keepdim=True))
        self.counts = torch.stack([each.counts for each in every]).sum(0)

    def values(self) -> tuple[Float[Tensor, "rows size"], Float[Tensor, "rows size"]]:
        if self.reach is None or not self.counts.any():
            _check_not_empty(torch.inf, -torch.inf)
        assert self.reach is not None
        centers = (torch.arange(ROW_BINS) + 0.5) * (2 / ROW_BINS) - 1
        return centers * self.reach, self.counts

    def _widen(self, most: Float[Tensor, "rows 1"]) -> None:
        assert self.reach is not None
        while (narrow := (most > self.reach).flatten()).any():
            merged = self.counts[narrow].unflatten(1, (-1, 2)).sum(2)
            self.counts[narrow] = pad(merged, (ROW_BINS // 4, ROW_BINS // 4))
            self.reach[narrow] *= 2


def _bounds(x: Tensor) -> tuple[float, float]:
    low, high = (float(v) for v in x.detach().aminmax())
    if not (low - low == 0 and high - high == 0):  # NaN or infinity
        raise UserError(
            "activation: a calibration activation is not finite; the model or its dtype "
            "overflows (model.dtype), so no static range can hold it."
        )
    return low, high


def _check_not_empty(low: float, high: float) -> None:
    if low > high:
        raise UserError("activation: the calibration data never reached a quantized tensor.")
