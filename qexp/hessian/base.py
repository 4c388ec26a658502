"""Where Hessians come from, and those at float weights, measured once for all jobs.

Scale is free everywhere: solvers give the same result for H and c·H.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from types import ModuleType
from typing import Any

from jaxtyping import Float
from torch import Tensor

from qexp.walk import Block

# Called with linears that have one Hessian in common, and that Hessian.
OnHessian = Callable[[tuple[str, ...], Float[Tensor, "columns columns"]], None]

# A block's index, and its Hessians by the names of the linears that share one, with blanks between.
Measured = tuple[int, dict[str, Tensor]]


class Hessian(ABC):
    @property
    @abstractmethod
    def blocks_per_pass(self) -> int:
        """How many blocks are measured together: work can be taken up again at multiples of it."""

    @property
    def is_precomputed(self) -> bool:
        """Whether `prepare` measures everything, so that no block has to be run."""
        return False

    def prepare(self, first: Block) -> None:  # noqa: B027
        """Measure what must be measured at float weights: called once, with the first block, before
        anything is rounded (also by a run that goes on where another was killed)."""

    @abstractmethod
    def for_each_group(self, block: Block, solve: OnHessian) -> None:
        """Hand every linear of the block to `solve`, once, with its Hessian as soon as that is
        known. May leave the block advanced (see `Block.advance`)."""

    def __call__(self, block: Block) -> dict[str, Float[Tensor, "_ _"]]:
        """The Hessian of each linear at the block's weights as they stand."""
        if block.index == 0:
            self.prepare(block)
        found: dict[str, Tensor] = {}

        def keep(names: tuple[str, ...], hessian: Tensor) -> None:
            found.update(dict.fromkeys(names, hessian))

        self.for_each_group(block, keep)
        block.left = None  # nothing was settled: the caller has yet to change the block
        return found


class CacheableHessian(Hessian):
    """Hessians that can all be measured before anything is rounded.

    memory: GiB of them that are held until they are used; the others wait in the cache on disk.
    """

    memory: float

    @abstractmethod
    def measure(self, first: Block, wanted: Collection[int]) -> Iterator[Measured]:
        """Those of some blocks, in order, at the weights as they stand."""

    @property
    def code(self) -> tuple[ModuleType, ...]:
        """Modules whose source the result depends on, apart from those of the class and its bases
        and what every Hessian needs (the walk, the task)."""
        return ()

    @abstractmethod
    def identity(self, first: Block) -> dict[str, Any]:
        """What they depend on, as JSON, beside the model, the data and the code."""
