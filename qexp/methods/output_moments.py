"""Second moments of a linear's inputs in the quantized and in the float model."""

from collections.abc import Iterable
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn


class OutputMoments(NamedTuple):
    """Means over tokens of x̃ x̃ᵀ, (x̃ - x) x̃ᵀ and (x̃ - x)(x̃ - x)ᵀ, where x̃ and x are inputs in
    the quantized and in the float model with a 1 at their ends, for the bias."""

    own: Float[Tensor, "inputs inputs"]
    moved: Float[Tensor, "inputs inputs"]
    gap: Float[Tensor, "inputs inputs"]

    @staticmethod
    def of(inputs: Iterable[Float[Tensor, "..."]], floats: Iterable[Tensor]) -> "OutputMoments":
        """Of chunks [..., columns] of equal tokens, accumulated in float32."""
        sums: list[Tensor] = []
        count = 0
        for own, other in zip(inputs, floats, strict=True):
            x, y = (each.detach().reshape(-1, each.shape[-1]).float() for each in (own, other))
            gap = nn.functional.pad(x - y.to(x), (0, 1))
            x = nn.functional.pad(x, (0, 1), value=1.0)
            parts = [x.T @ x, gap.T @ x, gap.T @ gap]
            sums = parts if not sums else [a + b for a, b in zip(sums, parts, strict=True)]
            count += len(x)
        return OutputMoments(*(total / count for total in sums))

    def exact(self) -> Float[Tensor, "inputs inputs"]:
        """The mean of x xᵀ."""
        return self.own - self.moved - self.moved.T + self.gap
