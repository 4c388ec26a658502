"""Losses of a block's output against its target."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

Output = Float[Tensor, "*tokens width"]


def mean_squares(output: Output, exact: Output) -> Float[Tensor, ""]:
    return (output - exact).square().mean()


def channel_statistics(output: Output, exact: Output) -> Float[Tensor, ""]:
    """The differences of each channel's mean and variance over tokens, absolute, a mean over
    channels (Norm Tweaking, 2309.02784)."""
    ours, theirs = (each.flatten(0, -2) for each in (output, exact))
    means = (ours.mean(0) - theirs.mean(0)).abs()
    variances = (ours.var(0, correction=0) - theirs.var(0, correction=0)).abs()
    return (means + variances).mean()


LOSSES: dict[str, Callable[[Output, Output], Float[Tensor, ""]]] = {
    "squares": mean_squares,
    "statistics": channel_statistics,
}
