"""A learned scale per channel (Quadapter)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Alpha(nn.Module):
    """alpha = exp(theta) of Quadapter, which multiplies channels: the folded scale is 1 / alpha."""

    def __init__(self, theta: Float[Tensor, " channels"]) -> None:
        super().__init__()
        self.theta = nn.Parameter(theta)

    def forward(self) -> Float[Tensor, " channels"]:
        return torch.exp(-self.theta)
