"""Where Hessians come from, and those at float weights, measured once for all jobs.

Scale is free everywhere: solvers give the same result for H and c·H.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from jaxtyping import Float
from torch import Tensor

from qexp import pieces as capture
from qexp import task
from qexp import walk as walking
from qexp.cache import Cache, sources
from qexp.errors import UserError
from qexp.walk import Block

# Called with linears that have one Hessian in common, and that Hessian.
Solve = Callable[[tuple[str, ...], Float[Tensor, "columns columns"]], None]

# A block's index, and its Hessians by the names of the linears that share one, with blanks between.
Measured = tuple[int, dict[str, Tensor]]

KIND = "hessians"


class Hessian(ABC):
    @property
    @abstractmethod
    def span(self) -> int:
        """How many blocks are measured together: work can be taken up again at multiples of it."""

    @property
    def ahead(self) -> bool:
        """Whether `prepare` measures everything, so that no block has to be run."""
        return False

    def prepare(self, first: Block) -> None:  # noqa: B027
        """Measure what must be measured at float weights: called once, with the first block, before
        anything is rounded (also by a run that goes on where another was killed)."""

    @abstractmethod
    def each(self, block: Block, solve: Solve) -> None:
        """Hand every linear of the block to `solve`, once, with its Hessian as soon as that is
        known. May leave the block advanced (see `Block.advance`)."""

    def __call__(self, block: Block) -> dict[str, Float[Tensor, "_ _"]]:
        """The Hessian of each linear at the block's weights as they stand."""
        if block.index == 0:
            self.prepare(block)
        found: dict[str, Tensor] = {}

        def keep(names: tuple[str, ...], hessian: Tensor) -> None:
            found.update(dict.fromkeys(names, hessian))

        self.each(block, keep)
        block.left = None  # nothing was settled: the caller has yet to change the block
        return found


class Shareable(Hessian):
    """Hessians that can all be measured before anything is rounded.

    memory: GiB of them that are held until they are used; the others wait in the cache on disk.
    """

    memory: float

    @abstractmethod
    def measured(self, first: Block, wanted: Collection[int]) -> Iterator[Measured]:
        """Those of some blocks, in order, at the weights as they stand."""

    @property
    def code(self) -> tuple[ModuleType, ...]:
        """Modules whose source the result depends on, apart from those of the class and its bases
        and what every Hessian needs (the walk, the task)."""
        return ()

    @abstractmethod
    def identity(self, first: Block) -> dict[str, Any]:
        """What they depend on, as JSON, beside the model, the data and the code."""


@dataclass(frozen=True)
class AtFloatWeights(Hessian):
    """Those of `source` where nothing that is rounded is felt by another layer.

    They depend on no grid and no solver, so they are kept in the cache for other jobs. One that
    wants them while another measures waits for it.
    """

    source: Shareable

    @property
    def span(self) -> int:
        return 1

    @property
    def ahead(self) -> bool:
        return True

    def prepare(self, first: Block) -> None:
        cache, missing, room = Cache(), [], self.source.memory * 2**30

        def hold(index: int, own: Mapping[str, Tensor], kept: bool) -> None:
            nonlocal room
            size = sum(hessian.nbytes for hessian in own.values())
            if kept and size > room:
                return
            room -= size
            first.notes.update({_prefix(first, index) + names: own[names] for names in own})

        with cache.alone(KIND, self._key(first, 0)):
            for index in range(len(first.task.blocks)):
                if (own := cache.find(KIND, self._key(first, index))) is None:
                    missing.append(index)
                else:
                    hold(index, own, kept=True)
            for index, own in self.source.measured(first, missing) if missing else ():
                kept = cache.put(KIND, self._key(first, index), own)
                hold(index, own, kept)

    def each(self, block: Block, solve: Solve) -> None:
        prefix = _prefix(block, block.index)
        held = [name for name in block.notes if name.startswith(prefix)]
        own = {name.removeprefix(prefix): block.notes.pop(name) for name in held}
        own = own or Cache().find(KIND, self._key(block, block.index)) or {}
        if not own:
            raise UserError(
                f"{block.name}: its Hessians went from the cache before they were used; run again, "
                "with more memory for them (method.hessian.memory)."
            )
        order = list(block.linears)
        for names in sorted(own, key=lambda names: order.index(names.split()[0])):
            members = tuple(names.split())
            solve(members, own[names].to(block.linears[members[0]].weight.device))

    def _key(self, block: Block, index: int) -> dict[str, Any]:
        """Everything that the Hessians of a block at float weights depend on."""
        return {
            "hessian": type(self.source).__name__,
            **self.source.identity(block),
            "content": block.origin,
            "block": index,
            "device": block.task.device.type,
            "code": sources(*_code(self.source)),
        }


def _code(source: Shareable) -> list[ModuleType]:
    """Every module that Hessians at float weights are made by."""
    classes = [sys.modules[kind.__module__] for kind in type(source).__mro__]
    own = [module for module in classes if module.__name__.partition(".")[0] == "qexp"]
    return [*own, *source.code, sys.modules[__name__], walking, capture, task]


def _prefix(block: Block, index: int) -> str:
    """Of the notes on a block's Hessians."""
    return f"{block.task.arch.blocks}.{index} "
