"""Interfaces of Hessians: what they are measured from, and how a method receives them.

To add a Hessian, implement `Hessian`, or `CacheableHessian` if it can be measured at float weights,
and add one yaml in conf/method/hessian/. A Hessian from gradients is a subclass of
`from_gradients.FromGradients`. The scale of a Hessian is free: solvers give the same result
for H and c·H.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

from jaxtyping import Float
from torch import Tensor

from qexp.common.errors import UserError
from qexp.solvers.base import Moments, Solver
from qexp.solvers.wrapper import OfDiagonal
from qexp.walk import Block

# Called with the names of linears that share one Hessian, with that Hessian and, by a walk that
# carries the float model's inputs along, with the moments of their common input.
OnHessian = Callable[[tuple[str, ...], Float[Tensor, "..."], Moments | None], None]

# Calls `on_hessian` for every linear of a block once, as soon as its Hessian is known. May leave
# the block settled (see `Block.advance`).
ForEachGroup = Callable[[Block, OnHessian], None]

# A block's index, and its Hessians by the names of the linears that share one, joined by blanks.
Measured = tuple[int, dict[str, Tensor]]


class Hessian(ABC):
    """In which loss the rounding error of a layer counts."""

    @property
    @abstractmethod
    def blocks_per_pass(self) -> int:
        """How many blocks are measured together: a run can be resumed at multiples of it."""

    @property
    def is_precomputed(self) -> bool:
        """Whether `prepare` measures everything, so that no block has to be run afterwards."""
        return False

    @property
    def divides(self) -> bool:
        """Whether processes can measure it on a part of the sequences each."""
        return True

    @property
    def is_own_moment(self) -> bool:
        """Whether the Hessian of a group is `Moments.own` of its inputs as the group is solved."""
        return False

    @property
    def is_matrix(self) -> bool:
        """Whether what is handed out for a linear is one matrix [columns, columns]."""
        return True

    def adapted(self, solver: Solver) -> Solver:
        """The solver for what is handed out. UserError where it needs something else."""
        return one_sided(solver)

    @abstractmethod
    def prepare(self, first: Block) -> ForEachGroup:
        """What hands out the Hessians of the blocks of one walk, in order.

        Called with the first block, before anything is rounded (also by a resumed run): what is
        measured at float weights is measured here.
        """

    def __call__(self, block: Block) -> dict[str, Float[Tensor, "..."]]:
        """The Hessian of each linear of one block; the block stays as it is."""
        return collected(self.prepare(block), block)


def one_sided(solver: Solver) -> Solver:
    """The solver for a Hessian [columns, columns]. UserError where it needs one of the outputs."""
    if solver.needs_both_sides:
        raise UserError(
            f"method.hessian: {type(solver).__name__} needs a Hessian of the outputs too; give "
            "method=yaqa, or method/hessian=output_both."
        )
    return OfDiagonal(solver) if solver.needs_diagonal else solver


def collected(for_each_group: ForEachGroup, block: Block) -> dict[str, Float[Tensor, "..."]]:
    """The Hessian of each linear of one block; the block stays as it is."""
    found: dict[str, Tensor] = {}

    def keep(names: tuple[str, ...], hessian: Tensor, _: Moments | None) -> None:
        found.update(dict.fromkeys(names, hessian))

    for_each_group(replace(block), keep)
    return found


class CacheableHessian(Hessian):
    """Hessians that can all be measured before anything is rounded.

    memory: GiB of them that are held until they are used; the others wait in the cache on disk.
    """

    memory: float

    @abstractmethod
    def measure(self, first: Block, wanted: Collection[int]) -> Iterator[Measured]:
        """The Hessians of the blocks with these indices, in order, at the weights as they are."""

    @property
    def code(self) -> tuple[ModuleType, ...]:
        """Modules whose source the result depends on, apart from those of the class and its bases
        and what every Hessian needs (the walk, the task)."""
        return ()

    @abstractmethod
    def identity(self, first: Block) -> dict[str, Any]:
        """What the Hessians depend on apart from the model, the data and the code, as JSON."""
