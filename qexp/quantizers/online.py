"""Online maps: invertible linear maps of activations, whose inverse is in the weights.

For a linear y = W x and an invertible T, y = (W T⁻¹)(T x). T x is computed in every forward pass,
before activations are rounded.
"""

from collections.abc import Mapping, Sequence
from math import isqrt, prod
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qexp.common.errors import UserError
from qexp.quantizers.hadamard import factors, hadamard

STORED = torch.float16  # of the matrices of a map
KINDS = ("hadamard", "identity", "matrix")


class Factor(NamedTuple):
    """A square matrix of a Kronecker product. kind: `hadamard` (H / √size), `identity`, or `matrix`
    (rounded to STORED; zeros until they are loaded where none is given)."""

    kind: str
    size: int
    matrix: Float[Tensor, "size size"] | None = None


class OnlineMap(nn.Module):
    """x → (F_1 ⊗ … ⊗ F_k) x along the last axis."""

    def __init__(self, parts: Sequence[Factor]) -> None:
        super().__init__()
        self.kinds = [(part.kind, part.size) for part in parts]
        for index, part in enumerate(parts):
            made = part.matrix
            if part.kind == "hadamard":
                made = hadamard(part.size)
            elif part.kind == "matrix":
                made = torch.zeros(part.size, part.size) if made is None else made
                made = made.detach().to(STORED).float()
            # A buffer for the device only: `stored` and `kinds` are what is kept.
            self.register_buffer(f"factor_{index}", made, persistent=part.kind == "matrix")

    @property
    def width(self) -> int:
        return prod(size for _, size in self.kinds)

    @property
    def scale(self) -> float:
        """Of the whole product: Hadamard factors hold 1 and -1."""
        return prod(size for kind, size in self.kinds if kind == "hadamard") ** -0.5

    def factors(self) -> list[Tensor | None]:
        """Matrices by factor, Hadamard's unscaled; None for identities."""
        return [getattr(self, f"factor_{index}") for index in range(len(self.kinds))]

    def forward(self, x: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens width"]:
        return kronecker(x, self.factors(), [size for _, size in self.kinds], self.scale)

    @torch.no_grad()
    def undo_rows(self, weight: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
        """W T⁻¹ in float64."""
        return self.dual()(weight.double())

    def dual(self) -> "Dual":
        """T⁻ᵀ, which leaves products with what T maps unchanged."""
        return Dual(self)

    def bits(self) -> int:
        """Stored bits: Hadamard matrices are built again from their sizes."""
        each = torch.finfo(STORED).bits
        return sum(each * size**2 for kind, size in self.kinds if kind == "matrix")

    def described(self) -> list[list[Any]]:
        """JSON values from which `restored` builds the map, its matrices aside."""
        return [[kind, size] for kind, size in self.kinds]

    def stored(self) -> dict[str, Tensor]:
        return {name: matrix.to(STORED) for name, matrix in self.state_dict().items()}

    def extra_repr(self) -> str:
        return " ⊗ ".join(f"{kind} {size}" for kind, size in self.kinds)


class Dual(nn.Module):
    """The inverse transpose of a map."""

    def __init__(self, inner: OnlineMap) -> None:
        super().__init__()
        self.sizes, self.scale = [size for _, size in inner.kinds], inner.scale
        for index, (kind, matrix) in enumerate(
            zip((kind for kind, _ in inner.kinds), inner.factors(), strict=True)
        ):
            made = matrix
            if matrix is not None and kind == "matrix":
                made = torch.linalg.inv(matrix.double()).T.contiguous()
            self.register_buffer(f"factor_{index}", made, persistent=False)

    def forward(self, x: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens width"]:
        parts = [getattr(self, f"factor_{index}") for index in range(len(self.sizes))]
        return kronecker(x, parts, self.sizes, self.scale)


def kronecker(
    x: Float[Tensor, "*tokens width"],
    matrices: Sequence[Tensor | None],
    sizes: Sequence[int],
    scale: float = 1.0,
) -> Float[Tensor, "*tokens width"]:
    """scale (M_1 ⊗ … ⊗ M_k) x along the last axis, computed in float32 or wider; a matrix that is
    None is an identity."""
    with torch.autocast(x.device.type, enabled=False):
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        right = prod(sizes)
        for matrix, size in zip(matrices, sizes, strict=True):
            right //= size
            if matrix is None:
                continue
            own = matrix.to(y)
            y = y.reshape(-1, size) @ own.T if right == 1 else own @ y.reshape(-1, size, right)
        y = y.reshape(x.shape)
        return (y if scale == 1 else y * scale).to(x.dtype)


def hadamard_factors(size: int, generator: torch.Generator | None = None) -> list[Factor]:
    """A Hadamard matrix of this size as a fast product. Where none is known, its largest power of
    two times a random orthogonal matrix, which has to be stored. UserError without a generator."""
    found = factors(size)
    if found is not None:
        return [Factor("hadamard", each) for each in found]
    if generator is None:
        raise UserError(f"no Hadamard matrix of {size} rows is known here; give a random rotation")
    power = size & -size
    rest = orthogonal(size // power, generator)
    powers = [Factor("hadamard", each) for each in factors(power) or [] if each > 1]
    return [Factor("matrix", len(rest), rest), *powers]


def orthogonal(size: int, generator: torch.Generator) -> Float[Tensor, "size size"]:
    """Uniform over the orthogonal group, float64: the signs of R's diagonal make QR unique."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).contiguous()


def balanced(size: int) -> tuple[int, int]:
    """The two factors of a number with the least difference, the smaller one first."""
    small = next(each for each in range(isqrt(size), 0, -1) if size % each == 0)
    return small, size // small


def restored(described: Sequence[Sequence[Any]], stored: Mapping[str, Tensor]) -> OnlineMap:
    """The map of `described` and `stored`. Raises UserError where a matrix is missing."""
    made = OnlineMap([Factor(kind, size) for kind, size in described])
    if made.state_dict().keys() != stored.keys():
        raise UserError(
            "the weights file lacks matrices of an online map, without which its weights are of no "
            "use; run the configuration again with save_weights=true."
        )
    made.load_state_dict({name: matrix.float() for name, matrix in stored.items()})
    return made
