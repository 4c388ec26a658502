"""AdamW with learning rates per kind of parameter, and the learning rate schedule."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qexp.common.errors import FieldError, check_finite, check_positive, check_range
from qexp.training.fsdp import full_tensor

KINDS = ("weights", "scales", "offsets", "channels", "codes")


@dataclass(frozen=True)
class AdamW:
    """AdamW with separate learning rates, linear warmup and cosine decay.

    weights, scales, offsets, channels, codes: learning rates of weights, scales, zero points (in
    codes), logarithms of channel scales, and codes. codes_betas: the betas of codes. relative: the
    rate of scales is relative to each tensor's initial mean scale. Adam changes a parameter by
    about its rate per step, whatever its gradient, and the scales of one model lie between 1e-3 and
    10: an absolute rate for small scales would hardly change large ones, which come from outliers.
    warmup: share of all steps. floor: final rate relative to the peak. clip: largest norm of all
    gradients together, those of codes left out; null for none.
    """

    weights: float = 2e-5
    scales: float = 3e-3
    offsets: float = 3e-2
    channels: float = 1e-3
    codes: float = 0.2
    relative: bool = True
    weight_decay: float = 0.0  # only for weights
    betas: tuple[float, float] | list[float] = (0.9, 0.999)
    codes_betas: tuple[float, float] | list[float] = (0.0, 0.95)
    warmup: float = 0.05
    floor: float = 0.0
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        check_finite(None, self, *KINDS, "weight_decay")
        check_range(None, self, "a number from 0 to 1", lambda x: 0 <= x <= 1, "warmup", "floor")
        if self.clip is not None:
            check_positive(None, self, "clip")
        for key in ("betas", "codes_betas"):
            betas = getattr(self, key)
            valid = (type(beta) in (int, float) and 0 <= beta < 1 for beta in betas)
            if len(betas) != 2 or not all(valid):
                raise FieldError(f"{key}={betas}: give two numbers from 0 to below 1.")

    def optimizer(self, parameters: Mapping[str, Sequence[nn.Parameter]]) -> torch.optim.Optimizer:
        groups: list[dict[str, Any]] = []
        for kind in KINDS:
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
        return torch.optim.AdamW(groups, betas=(self.betas[0], self.betas[1]), fused=True)

    def factor(self, step: int, steps: int) -> float:
        """The factor of all learning rates at a step counted from 0, of `steps`."""
        rise = round(self.warmup * steps)
        if step < rise:
            return (step + 1) / (rise + 1)
        done = min((step - rise) / max(steps - rise, 1), 1.0)
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * done)) / 2
