"""Low-rank updates of a weight (LoRA): merged before rounding, or kept in storage after it."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qexp.common.errors import FieldError, UserError, check_choice, check_int, check_positive
from qexp.grid.scale import DTYPES
from qexp.packed.base import Packed
from qexp.packed.low_rank import LowRank, plus_product
from qexp.quantizers.fake_quantize import straight_through


class LowRankUpdate(nn.Module):
    """Parametrization of a weight: weight + factor · up · down (LoRA, 2106.09685).

    dtype: of the factors in storage, with `factor` part of the first. The forward pass uses them as
    they are stored, in evaluation with the values of storage bit for bit. None for an update before
    rounding, which changes only codes and is not stored.
    """

    def __init__(
        self,
        up: Float[Tensor, "rows rank"],
        down: Float[Tensor, "rank columns"],
        factor: float,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.factor, self.dtype = factor, dtype
        self.up, self.down = nn.Parameter(up), nn.Parameter(down)

    @staticmethod
    def zero(
        weight: Float[Tensor, "rows columns"],
        rank: int,
        alpha: float,
        dtype: torch.dtype | None = None,
    ) -> "LowRankUpdate":
        """A product of 0: `up` is 0, `down` random."""
        down = weight.new_empty(rank, weight.shape[1])
        nn.init.kaiming_uniform_(down, a=5**0.5)
        return LowRankUpdate(weight.new_zeros(len(weight), rank), down, alpha / rank, dtype)

    def forward(self, weight: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        if self.dtype is None:
            return weight + self.factor * (self.up @ self.down)
        outputs, inputs = (
            straight_through(stored.to(trained), trained)
            for stored, trained in zip(self.stored(), self._scaled(), strict=True)
        )
        if self.training:
            return weight + outputs.T @ inputs
        return plus_product(weight, outputs, inputs).to(weight)

    @torch.no_grad()
    def packed(self, base: Packed) -> LowRank:
        """The stored form of the sum with a stored weight."""
        return LowRank(base, *self.stored())

    def stored(self) -> tuple[Float[Tensor, "rank rows"], Float[Tensor, "rank columns"]]:
        assert self.dtype is not None
        outputs, inputs = (each.detach().to(self.dtype) for each in self._scaled())
        return outputs, inputs

    def _scaled(self) -> tuple[Float[Tensor, "rank rows"], Float[Tensor, "rank columns"]]:
        return (self.factor * self.up).T.contiguous(), self.down


@dataclass(frozen=True)
class NoAdapter:
    """No low-rank residual."""

    def check(self, rows: int, columns: int) -> None:
        return None

    def of(self, linear: nn.Linear, start: Packed | None) -> None:
        return None


@dataclass(frozen=True)
class Adapter:
    """A low-rank residual that stays in the quantized model: y = (Q + factor · up · down) x, where
    x is the input as activation quantizers leave it (QLoRA, 2305.14314).

    It starts with the factors that an earlier method stored for the linear, of whichever rank those
    are, and with a product of 0 elsewhere.

    rank: of those that start with 0; 0 leaves them out. alpha: factor = alpha / rank; null: 1.
    factors: dtype in storage.
    """

    rank: int = 64
    alpha: float | int | None = 16.0
    factors: str = "float16"

    def __post_init__(self) -> None:
        check_int(None, self, rank=0)
        if self.alpha is not None:
            check_positive(None, self, "alpha")
        check_choice(None, self, factors=DTYPES)

    def check(self, rows: int, columns: int) -> None:
        """FieldError for a rank that no [rows, columns] matrix has."""
        if self.rank > (most := min(rows, columns)):
            raise FieldError(
                f"adapter.rank={self.rank}: a [{rows}, {columns}] matrix has rank {most} at most; "
                "give at most that."
            )

    def of(self, linear: nn.Linear, start: Packed | None) -> LowRankUpdate | None:
        """The update of a linear, of which `start` is what was stored."""
        dtype = DTYPES[self.factors]
        if not isinstance(start, LowRank):
            if not self.rank:
                return None
            alpha = self.rank if self.alpha is None else self.alpha
            return LowRankUpdate.zero(linear.weight.detach(), self.rank, alpha, dtype)
        parts = start.outputs, start.inputs
        if not all(isinstance(part, Tensor) for part in parts):
            raise UserError(
                "method.start.residual.factors: factors on a grid do not train; give float16."
            )
        outputs, inputs = (part.float() for part in parts if isinstance(part, Tensor))
        factor = 1.0 if self.alpha is None else self.alpha / len(outputs)
        up = outputs.T.contiguous() / factor
        return LowRankUpdate(up, inputs.clone(), factor, dtype).to(linear.weight)
