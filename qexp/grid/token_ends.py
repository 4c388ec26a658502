"""Static ranges from the extremes of tokens (Outlier Suppression, 2209.13325)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.common.errors import UserError, check_range
from qexp.grid.observers import Observer
from qexp.grid.ranges import OfStream


@dataclass(frozen=True)
class TokenQuantile(OfStream):
    """From the quantile 1 - share of the tokens' minima to the quantile `share` of their maxima;
    the min-max interval of a single tensor. share=1 is min-max."""

    share: float | int = 0.99

    def __post_init__(self) -> None:
        check_range(
            "range", self, "a number above 0.5 and at most 1", lambda x: 0.5 < x <= 1, "share"
        )

    def observer(self, per_row: bool = False) -> Observer:
        return TokenObserver(self.share)


class TokenObserver(Observer):
    """The smallest and the largest value of every vector along the last axis."""

    def __init__(self, share: float) -> None:
        self.share = share
        self.ends: list[tuple[Tensor, Tensor]] = []

    def add(self, x: Float[Tensor, "..."]) -> None:
        low, high = x.detach().float().reshape(-1, x.shape[-1]).aminmax(dim=1)
        if not (low.isfinite().all() and high.isfinite().all()):
            raise UserError(
                "activation: a calibration activation is not finite; the model or its dtype "
                "overflows (model.dtype), so no static range can hold it."
            )
        self.ends.append((low.cpu(), high.cpu()))

    def merge(self, others: Sequence["TokenObserver"]) -> None:
        for other in others:
            self.ends += other.ends

    def values(self) -> tuple[Float[Tensor, "1 2"], None]:
        if not self.ends:
            raise UserError("activation: the calibration data never reached a quantized tensor.")
        low, high = (torch.cat(part) for part in zip(*self.ends, strict=True))
        ends = low.quantile(1 - self.share), high.quantile(self.share)
        return torch.stack(ends)[None], None
