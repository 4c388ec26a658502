"""Online maps and rotations of heads that train with one block."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qexp.arch import Group
from qexp.quantizers.attention import Inside, inserted
from qexp.quantizers.maps import attention_group, map_inputs, map_keys, shared_input
from qexp.quantizers.online import Factor, OnlineMap, kronecker, orthogonal
from qexp.quantizers.operands import attention_modules
from qexp.transforms.channels import parametrized
from qexp.transforms.heads import turn_values, turned_columns, turned_rows
from qexp.transforms.reconstruction import Changed
from qexp.walk import Block

Matrix = Float[Tensor, "*heads size size"]


class Square(nn.Module, ABC):
    """A matrix, or one for each head, that trains and has an inverse."""

    size: int

    @abstractmethod
    def forward(self) -> Matrix: ...

    @abstractmethod
    def dual(self) -> Matrix:
        """The inverse transpose."""


class Invertible(Square):
    """U diag(s) Vᵀ with U and V orthogonal and s positive (FlatQuant, 2410.09426): a Cayley
    transform of a skew matrix each, U times a random orthogonal start; s begins with ones."""

    def __init__(self, size: int, generator: torch.Generator) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("start", orthogonal(size, generator).float(), persistent=False)
        self.left = nn.Parameter(torch.zeros(size, size))
        self.right = nn.Parameter(torch.zeros(size, size))
        self.log_scale = nn.Parameter(torch.zeros(size))

    def forward(self) -> Matrix:
        return self._product(self.log_scale.exp())

    def dual(self) -> Matrix:
        return self._product((-self.log_scale).exp())

    def _product(self, scale: Float[Tensor, " size"]) -> Matrix:
        left, right = cayley(self.left), cayley(self.right)
        product: Tensor = self.get_buffer("start") @ left * scale @ right.T
        return product


class Banded(Square):
    """I + stability · M, of whose entries those within `band` of the diagonal are used, the
    diagonal not (AffineQuant, 2403.12544: its diagonal is a channel scale before the matrix). M
    begins with zeros. heads: the number of such matrices; None is one."""

    def __init__(self, size: int, heads: int | None, stability: float) -> None:
        super().__init__()
        self.size, self.stability, self.band = size, stability, size
        self.inner = nn.Parameter(torch.zeros(*([] if heads is None else [heads]), size, size))

    def forward(self) -> Matrix:
        place = torch.arange(self.size, device=self.inner.device)
        distance = (place[:, None] - place).abs()
        used = (distance > 0) & (distance <= self.band)
        return torch.eye(self.size, device=self.inner.device) + self.stability * self.inner * used

    def dual(self) -> Matrix:
        return torch.linalg.inv(self()).transpose(-1, -2)


def cayley(parameter: Matrix) -> Matrix:
    """(I + A)⁻¹ (I - A) with A the skew difference of a matrix and its transpose: orthogonal."""
    skew = parameter - parameter.T
    eye = torch.eye(len(skew), dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(eye + skew, eye - skew)


class LearnedMap(nn.Module):
    """A Kronecker product on what the linears of a group read, and its inverse in their weights.

    parts: by factor; an int is the size of an identity.
    """

    def __init__(self, block: Block, group: Group, parts: list[Square | int]) -> None:
        super().__init__()
        self.place = block, group
        self.sizes = [p if isinstance(p, int) else p.size for p in parts]
        self.learned = nn.ModuleList(p for p in parts if isinstance(p, Square))
        self.parts = parts

    def forward(self, x: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens width"]:
        return kronecker(x, self._matrices(lambda part: part()), self.sizes)

    def fold_into(self, weight: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
        return kronecker(weight, self._matrices(lambda part: part.dual()), self.sizes)

    @contextmanager
    def live(self) -> Iterator[None]:
        block, group = self.place
        site = shared_input(block.task, block.index, group)
        with ExitStack() as stack:
            for name in group.linears:
                change = Changed(self.fold_into)
                stack.enter_context(parametrized(block.linears[name], "weight", change))
            site.map = self
            try:
                yield
            finally:
                site.map = None

    @torch.no_grad()
    def fold(self) -> None:
        """Make it permanent, with matrices as they are stored."""
        block, group = self.place
        pairs = zip(self.sizes, self._matrices(lambda part: part()), strict=True)
        made = [Factor("identity" if m is None else "matrix", size, m) for size, m in pairs]
        map_inputs(block.task, block.index, group, OnlineMap(made))

    def _matrices(self, of: Callable[[Square], Tensor]) -> list[Tensor | None]:
        return [of(p) if isinstance(p, Square) else None for p in self.parts]


class LearnedKeys(nn.Module):
    """A matrix on each head's vector of the keys, after a rotary embedding; its inverse transpose
    on those of the queries."""

    def __init__(self, block: Block, inner: Invertible) -> None:
        super().__init__()
        self.block, self.inner = block, inner

    @contextmanager
    def live(self) -> Iterator[None]:
        task = self.block.task
        maps: dict[str, nn.Module] = {
            "query": Changed(lambda x: x @ self.inner.dual().T),
            "key": Changed(lambda x: x @ self.inner().T),
        }
        modules = attention_modules(task, self.block.index)
        with inserted(task.model, {module: Inside({}, maps) for module in modules}):
            yield

    @torch.no_grad()
    def fold(self) -> None:
        matrix = self.inner()
        map_keys(
            self.block.task, self.block.index, OnlineMap([Factor("matrix", len(matrix), matrix)])
        )


class LearnedValues(nn.Module):
    """A matrix on each value head, in the rows of the value projection; its inverse is in the
    columns of the output projection."""

    def __init__(self, block: Block, inner: Square) -> None:
        super().__init__()
        self.block, self.inner = block, inner

    @contextmanager
    def live(self) -> Iterator[None]:
        group = attention_group(self.block.task)
        producer = self.block.linears[str(group.producer)]
        with ExitStack() as stack:
            for kind in ("weight", "bias"):
                if getattr(producer, kind) is not None:
                    change = Changed(partial(turned_rows, self.inner))
                    stack.enter_context(parametrized(producer, kind, change))
            change = Changed(partial(turned_columns, self.inner.dual))
            stack.enter_context(
                parametrized(self.block.linears[group.linears[0]], "weight", change)
            )
            yield

    @torch.no_grad()
    def fold(self) -> None:
        turn_values(self.block.task, self.block.index, self.inner().double())
