"""How fast each kind of parameter moves."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

KINDS = ("weights", "scales", "offsets", "channels")


@dataclass(frozen=True)
class AdamW:
    """AdamW with a learning rate of its own for weights, scales, offsets (zero points) and channels
    (logarithms of channel scales); a rise over the first `warmup` share of all steps, then a cosine
    down to `floor` of the rate."""

    weights: float = 2e-5
    scales: float = 1e-3
    offsets: float = 1e-3
    channels: float = 1e-3
    weight_decay: float = 0.0  # of weights alone
    betas: tuple[float, float] | list[float] = (0.9, 0.999)
    warmup: float = 0.05
    floor: float = 0.0
    clip: float | None = 1.0  # largest norm of all gradients together

    def optimizer(self, parameters: Mapping[str, Sequence[nn.Parameter]]) -> torch.optim.Optimizer:
        groups = [
            {
                "params": list(parameters[kind]),
                "lr": getattr(self, kind),
                "weight_decay": self.weight_decay if kind == "weights" else 0.0,
            }
            for kind in KINDS
            if parameters.get(kind)
        ]
        # Fused: one pass over the weights and their moments instead of about ten.
        return torch.optim.AdamW(groups, betas=(self.betas[0], self.betas[1]), fused=True)

    def factor(self, step: int, steps: int) -> float:
        """Of every rate, at a step counted from 0."""
        rise = round(self.warmup * steps)
        if step < rise:
            return (step + 1) / (rise + 1)
        done = min((step - rise) / max(steps - rise, 1), 1.0)
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * done)) / 2
