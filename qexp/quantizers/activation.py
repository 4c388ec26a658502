"""Fake quantization of activations: static or dynamic ranges, constant or trained scales."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from qexp.grid import Grid, Scale
from qexp.grid.codebook import CodebookGrid
from qexp.grid.observers import MinMaxObserver, Observer
from qexp.grid.shares import Shares
from qexp.quantizers.fake_quantize import FakeQuantize, as_stored, lsq_gradient_scale


class FakeQuant(nn.Module):
    """Rounds a tensor to a grid in the forward pass.

    dynamic: scales of each tensor as it comes, per vector along the last axis (token), per group
    of it or per tensor, as the grid says; values inside the fitted range count as not clipped, so
    that gradients are those of rounding only. Otherwise one static scale, fitted by the grid's
    range estimator to what passes between `start_observing` and `fix_range`. Before `fix_range`
    nothing is rounded. Gradients are straight-through until `make_trainable` chooses other
    surrogates; between `make_trainable` and `make_constant` a static scale is a parameter.

    outliers: of dynamic scales, see `around_outliers`; None: every column is rounded. per_row: a
    static scale for each row of a matrix. keep_clipped: values beyond the fitted range pass as they
    are. caller: settings of what calls it, a part of its text.

    kept: while it is a list, of every rounded tensor the number of values that passed, and of all.
    """

    kinds: ClassVar[Mapping[str, str]] = {"scale": "scales", "zero": "offsets"}
    scale: Tensor
    zero: Tensor
    ends: Tensor  # of static ranges beyond which values pass
    levels: Tensor  # of a codebook

    def __init__(
        self,
        grid: Grid,
        dynamic: bool,
        outliers: float | int | None = None,
        per_row: bool = False,
        keep_clipped: bool = False,
        caller: str = "",
    ) -> None:
        super().__init__()
        self.grid, self.dynamic, self.outliers = grid, dynamic, outliers
        self.per_row, self.keep_clipped, self.caller = per_row, keep_clipped, caller
        self.observer: Observer | None = None
        self.running: Observer | None = None  # of a range that moves in training
        self.kept: list[tuple[int, int]] | None = None
        self.enabled = False
        self.fake_quantize, self.highest_code = FakeQuantize(), 1.0
        self.register_buffer("scale", torch.ones(0, 1))
        self.register_buffer("zero", torch.zeros(0, 1))
        if keep_clipped and not dynamic:
            self.register_buffer("ends", torch.zeros(0, 2))
        if isinstance(grid, CodebookGrid):
            self.register_buffer("levels", grid.state)

    def start_observing(self) -> None:
        if not self.dynamic:
            self.observer = self.grid.range.observer(self.per_row)

    def fix_range(self) -> None:
        """Fit the grid to what was observed and start to round."""
        if self.observer is not None:
            self._fit(self.observer)
            self.observer = None
        self.enabled = True

    def _fit(self, observer: Observer) -> None:
        device = self.scale.device
        q = self.grid.fit(*observer.values())
        self.scale, self.zero = q.scale.to(device), q.zero.to(device)
        if "ends" in self._buffers and q.fitted is not None:
            self.ends = torch.cat(q.fitted, 1).to(device)

    def narrow(self, low: float, high: float) -> None:
        """Keep these shares of both ends of the range."""
        self.grid = replace(self.grid, range=Shares(self.grid.range, low, high))  # type: ignore[type-var]
        self.register_buffer("shares", torch.tensor([low, high], device=self.scale.device))

    def fix_levels(self, grid: CodebookGrid) -> None:
        """Round to the levels of this grid from now on."""
        self.grid, self.levels = grid, grid.state.to(self.scale.device)

    def make_trainable(self, fake_quantize: FakeQuantize, offset: bool) -> None:
        """Train a static scale; with `offset` its zero point too, where the grid has one."""
        self.fake_quantize = fake_quantize
        if not self.dynamic:
            self.highest_code = max(self.grid.bounds[1] - float(self.zero.mean()), 1.0)
            self._keep(nn.Parameter(self.scale), self.zero)
            if offset and self.grid.has_zero:
                self._keep(self.scale, nn.Parameter(self.zero))

    def follow(self) -> None:
        """Let a static scale follow what passes in training, as the grid's range averages it."""
        self._keep(self.scale.detach(), self.zero.detach())
        self.running = self.grid.range.observer()

    @property
    def notes(self) -> dict[str, float]:
        """State of a running range."""
        assert isinstance(self.running, MinMaxObserver)
        return self.running.notes

    def before_step(self, step: int, steps: int) -> None:
        """Called before each step of training, counted from 0, of `steps`."""
        self.fake_quantize = self.fake_quantize.at(step, steps)

    def make_constant(self) -> None:
        """Replace the trained scale and zero point by constants, as storage keeps them."""
        q = as_stored(self.scale.detach(), self.zero.detach(), self.grid)
        self._keep(q.scale, q.zero)
        self.fake_quantize, self.running, self.enabled = FakeQuantize(), None, True

    def place(self) -> Scale:
        """The static scale and zero point, as storage would keep them."""
        if self.scale.requires_grad or self.zero.requires_grad:
            return as_stored(self.scale, self.zero, self.grid)
        return Scale(self.scale, self.zero)

    def positions(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """x / scale + zero, in scales of the tensor itself where they are dynamic."""
        rows = x.float().reshape(-1, x.shape[-1])
        q = self.grid.scales_of(rows) if self.dynamic else self.place()
        scale, zero = (part.reshape(-1, 1) for part in (q.scale, q.zero))
        groups = rows if len(scale) == 1 else rows.reshape(len(scale), -1)
        return (groups / scale + zero).reshape(x.shape)

    def _keep(self, scale: Tensor, zero: Tensor) -> None:
        for name, tensor in (("scale", scale), ("zero", zero)):
            delattr(self, name)
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        if self.observer is not None:
            self.observer.add(x)
        if self.running is not None and self.training:
            self.running.add(x)
            self._fit(self.running)
        if not self.enabled:
            return x
        if self.dynamic:
            rows = x.reshape(-1, x.shape[-1])
            return around_outliers(self._rounded_rows, rows, self.outliers).reshape(x.shape)
        factor = lsq_gradient_scale(x.numel(), self.highest_code)
        y = self.fake_quantize(x, self.place(), self.grid, factor, self.training)
        return self._with_clipped(x, y, *self.ends.split(1, 1)) if self.keep_clipped else y

    def _rounded_rows(self, rows: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        q = self.grid.scales_of(rows.detach().float())
        y = self.fake_quantize.rows(rows, q, self.grid, training=self.training)
        if not self.keep_clipped or q.fitted is None:
            return y
        groups, made = (part.reshape(q.scale.numel(), -1) for part in (rows, y))
        low, high = (end.reshape(-1, 1) for end in q.fitted)
        return self._with_clipped(groups, made, low, high).reshape(rows.shape)

    def _with_clipped(self, x: Tensor, y: Tensor, low: Tensor, high: Tensor) -> Tensor:
        clipped = beyond(x, low, high)
        if self.kept is not None:
            self.kept.append((int(clipped.sum()), clipped.numel()))
        return torch.where(clipped, x, y)

    def extra_repr(self) -> str:
        """All but the ranges of what it does to a tensor: part of what results depend on."""
        apart = "" if self.outliers is None else f", outliers={self.outliers}"
        apart += ", keep_clipped=True" if self.keep_clipped else ""
        return (
            f"{self.grid}, dynamic={self.dynamic}{apart}, on={self.enabled}, {self.fake_quantize}"
            + (f", {self.caller}" if self.caller else "")
        )

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        # A new quantizer has no scales yet: take the shapes of those in the file.
        if prefix + "shares" in state:
            self.narrow(*state[prefix + "shares"].tolist())
        for name in self._buffers:
            if prefix + name in state:
                setattr(self, name, torch.empty_like(state[prefix + name]))
        self.enabled = True
        super()._load_from_state_dict(state, prefix, *rest)
        if isinstance(self.grid, CodebookGrid):
            self.grid = self.grid.with_state(self.levels)


def beyond(
    x: Float[Tensor, "rows columns"], low: Float[Tensor, "rows 1"], high: Float[Tensor, "rows 1"]
) -> Bool[Tensor, "rows columns"]:
    """The values outside the interval of their row."""
    return (x < low) | (x > high)


def around_outliers(
    rounded: Callable[[Float[Tensor, "rows columns"]], Float[Tensor, "rows columns"]],
    rows: Float[Tensor, "rows columns"],
    outliers: float | int | None,
) -> Float[Tensor, "rows columns"]:
    """The `rounded` rows but for the columns with a magnitude of at least `outliers`: those pass as
    they are, and count as zeros where the others are rounded (LLM.int8, 2208.07339)."""
    if outliers is None:
        return rounded(rows)
    apart = rows.detach().abs().amax(0) >= outliers
    return torch.where(apart, rows, rounded(rows.masked_fill(apart, 0)))
