"""Optimizers with learning rates per kind of parameter, and their schedules."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qexp.common.errors import FieldError, UserError, check_finite, check_positive, check_range
from qexp.training.fsdp import full_tensor

TINY = torch.finfo(torch.float32).tiny
KINDS = ("weights", "scales", "offsets", "channels", "rounding", "ranges", "codes")
Parameters = Mapping[str, Sequence[nn.Parameter]]  # by kind


class Optimizer(ABC):
    """Learning rates of kinds of parameters and their schedule. clip: largest norm of all gradients
    together; None for none."""

    clip: float | None
    passes: int = 1  # forward and backward passes of a step

    @property
    @abstractmethod
    def kinds(self) -> tuple[str, ...]:
        """The kinds that have a rate; the others do not train."""

    @abstractmethod
    def optimizer(self, parameters: Parameters) -> torch.optim.Optimizer: ...

    @abstractmethod
    def factor(self, step: int, steps: int) -> float:
        """The factor of all learning rates at a step counted from 0, of `steps`."""


@dataclass(frozen=True)
class AdamW(Optimizer):
    """AdamW with separate learning rates, linear warmup and cosine decay.

    weights, scales, offsets, channels, rounding, ranges, codes: learning rates of weights, scales,
    zero points (in codes), logarithms of channel scales, rounding variables, multipliers of ranges,
    and codes; None for what does not train. codes_betas: the betas of codes. relative: the rate of
    scales is relative to each tensor's initial mean scale. Adam changes a parameter by about its
    rate per step, whatever its gradient, and the scales of one model lie between 1e-3 and 10: an
    absolute rate for small scales would hardly change large ones, which come from outliers.
    warmup: share of all steps. floor: final rate relative to the peak. clip: largest norm of all
    gradients together, those of codes left out; null for none. sam: radius of sharpness-aware
    minimization (2010.01412): gradients are those at the parameters plus sam g / ‖g‖, two passes a
    step; 0 for none.
    """

    weights: float | None = 2e-5
    scales: float | None = 3e-3
    offsets: float | None = 3e-2
    channels: float | None = 1e-3
    rounding: float | None = 1e-3
    ranges: float | None = 1e-3
    codes: float | None = 0.2
    relative: bool = True
    weight_decay: float = 0.0  # only for weights
    betas: tuple[float, float] | list[float] = (0.9, 0.999)
    codes_betas: tuple[float, float] | list[float] = (0.0, 0.95)
    warmup: float = 0.05
    floor: float = 0.0
    clip: float | None = 1.0
    sam: float | int = 0.0

    def __post_init__(self) -> None:
        check_finite(None, self, *self.kinds, "weight_decay", "sam")
        check_range(None, self, "a number from 0 to 1", lambda x: 0 <= x <= 1, "warmup", "floor")
        if self.clip is not None:
            check_positive(None, self, "clip")
        for key in ("betas", "codes_betas"):
            betas = getattr(self, key)
            valid = (type(beta) in (int, float) and 0 <= beta < 1 for beta in betas)
            if len(betas) != 2 or not all(valid):
                raise FieldError(f"{key}={betas}: give two numbers from 0 to below 1.")

    @property
    def passes(self) -> int:  # type: ignore[override]
        return 2 if self.sam else 1

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(kind for kind in KINDS if getattr(self, kind) is not None)

    def optimizer(self, parameters: Parameters) -> torch.optim.Optimizer:
        groups: list[dict[str, Any]] = []
        for kind in self.kinds:
            rate, members = getattr(self, kind), list(parameters.get(kind, ()))
            if kind == "scales" and self.relative:
                for scale in members:
                    unit = float(full_tensor(scale.detach()).abs().mean())
                    groups.append({"params": [scale], "lr": rate * unit, "weight_decay": 0.0})
            elif members:
                decay = self.weight_decay if kind == "weights" else 0.0
                betas = tuple(self.codes_betas if kind == "codes" else self.betas)
                own = {"params": members, "lr": rate, "weight_decay": decay, "betas": betas}
                groups.append(own)
        # Fused: one pass over weights and moments instead of about ten.
        made = torch.optim.AdamW(groups, betas=(self.betas[0], self.betas[1]), fused=True)
        return _SharpnessAware(made, self.sam) if self.sam else made

    def factor(self, step: int, steps: int) -> float:
        rise = round(self.warmup * steps)
        if step < rise:
            return (step + 1) / (rise + 1)
        done = min((step - rise) / max(steps - rise, 1), 1.0)
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True)
class SignSGD(Optimizer):
    """Steps of one size against the gradient's sign, with linear decay to 0 (SignSGD, 2309.05516).

    rounding, ranges: first step sizes of rounding variables and of multipliers of ranges, in units
    of 1 / steps: with 1 a parameter moves by at most (1 + 1 / steps) / 2 in all. 0 fixes them.
    """

    rounding: float = 1.0
    ranges: float = 1.0
    clip = None

    def __post_init__(self) -> None:
        check_finite(None, self, *self.kinds)

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("rounding", "ranges")

    def optimizer(self, parameters: Parameters) -> torch.optim.Optimizer:
        groups = [
            {"params": list(parameters[kind]), "lr": getattr(self, kind)}
            for kind in self.kinds
            if parameters.get(kind)
        ]
        return _SignDescent(groups, {})

    def factor(self, step: int, steps: int) -> float:
        return (1 - step / steps) / steps


@dataclass(frozen=True)
class CayleySGD(Optimizer):
    """Gradient descent on orthogonal matrices, with cosine decay to 0 (SpinQuant, 2405.16406).

    With W the skew part of G Rᵀ, R becomes (I + aW/2)⁻¹ (I - aW/2) R, for which the reference takes
    five steps of a fixed-point iteration. rotations: a, unless 1 / ‖W‖₁ is smaller; 0 fixes them.
    """

    rotations: float | int = 1.5
    clip = None

    def __post_init__(self) -> None:
        check_finite(None, self, *self.kinds)

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("rotations",)

    def optimizer(self, parameters: Parameters) -> torch.optim.Optimizer:
        return _CayleyDescent(list(parameters["rotations"]), {"lr": float(self.rotations)})

    def factor(self, step: int, steps: int) -> float:
        return (1 + math.cos(math.pi * step / steps)) / 2


class _CayleyDescent(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None or not (gradient := parameter.grad.double()).any():
                    continue
                r = parameter.double()
                skew = (gradient @ r.T - r @ gradient.T) / 2
                half = min(group["lr"], 1 / float(torch.linalg.matrix_norm(skew, 1))) / 2 * skew
                eye = torch.eye(len(r), dtype=r.dtype, device=r.device)
                parameter.copy_(torch.linalg.solve(eye + half, (eye - half) @ r))
        return loss


class _SignDescent(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad.sign(), alpha=group["lr"])


class _SharpnessAware(torch.optim.Optimizer):
    """Steps of another optimizer with the gradients of the worst point nearby, as far as a linear
    approximation tells (2010.01412, section 3)."""

    def __init__(self, inner: torch.optim.Optimizer, radius: float) -> None:
        super().__init__(inner.param_groups, {})
        self.inner, self.radius = inner, radius
        self._share()

    def _share(self) -> None:
        self.param_groups, self.state = self.inner.param_groups, self.inner.state

    def load_state_dict(self, state_dict: Any) -> None:
        self.inner.load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if closure is None:
            raise UserError(
                "method.blocks.optimizer.sam: two passes a step are of methods that train the "
                "whole model; give 0."
            )
        with torch.enable_grad():
            loss = closure()
        moved = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in moved])
        before = [p.clone() for p in moved]
        for parameter in moved:
            parameter.add_(parameter.grad * (self.radius / norm.clamp(min=TINY)))
        with torch.enable_grad():
            closure()
        for parameter, value in zip(moved, before, strict=True):
            parameter.copy_(value)
        self.inner.step()
        return loss
