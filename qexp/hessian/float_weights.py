"""Hessians at float weights, measured once and shared between jobs through the cache."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from torch import Tensor

from qexp import task
from qexp.common import hashes, numerics
from qexp.common.cache import Cache, sources
from qexp.common.errors import UserError
from qexp.hessian.base import CacheableHessian, Hessian, OnHessian
from qexp.walk import Block, capture
from qexp.walk import blocks as walking

KIND = "hessians"


@dataclass(frozen=True)
class AtFloatWeights(Hessian):
    """The Hessians of `hessian` at float weights: no layer sees the rounding of another one.

    They depend on no grid and no solver, so they are kept in the cache for other jobs. A job that
    wants them while another job measures waits for it.
    """

    hessian: CacheableHessian

    @property
    def blocks_per_pass(self) -> int:
        return 1

    @property
    def divides(self) -> bool:
        return self.hessian.divides

    @property
    def is_precomputed(self) -> bool:
        return True

    def prepare(self, first: Block) -> "Precomputed":
        made = Precomputed(self.hessian, self.hessian.memory * 2**30)
        cache, missing = Cache(), []
        with cache.alone(KIND, made.key(first, 0)):
            for index in range(first.index, len(first.task.blocks)):
                if (found := cache.find(KIND, made.key(first, index))) is None:
                    missing.append(index)
                else:
                    made.hold(index, found, cached=True)
            for index, found in self.hessian.measure(first, missing) if missing else ():
                made.hold(index, found, cache.put(KIND, made.key(first, index), found))
        return made


@dataclass
class Precomputed:
    """Hessians of a walk by block: `room` bytes of them in memory, the others in the cache."""

    hessian: CacheableHessian
    room: float
    held: dict[int, Mapping[str, Tensor]] = field(default_factory=dict)

    def hold(self, index: int, found: Mapping[str, Tensor], cached: bool) -> None:
        """Keep a block's Hessians in memory where there is room, or where the cache has none."""
        size = sum(hessian.nbytes for hessian in found.values())
        if not cached or size <= self.room:
            self.room -= size
            self.held[index] = found

    def __call__(self, block: Block, on_hessian: OnHessian) -> None:
        """Hand out the Hessians of a block and forget them. UserError if the cache lost them."""
        found = self.held.pop(block.index, None)
        found = found or Cache().find(KIND, self.key(block, block.index))
        if not found:
            raise UserError(
                f"{block.name}: its Hessians went from the cache before they were used; run again, "
                "with more memory for them (method.hessian.memory)."
            )
        order = list(block.linears)
        for names in sorted(found, key=lambda names: order.index(names.split()[0])):
            members = tuple(names.split())
            device = block.linears[members[0]].weight.device
            on_hessian(members, found[names].to(device), None)

    def key(self, block: Block, index: int) -> dict[str, Any]:
        """Everything that the Hessians of a block at float weights depend on."""
        return {
            "hessian": type(self.hessian).__name__,
            **self.hessian.identity(block),
            "content": block.origin,
            "block": index,
            **numerics.identity(block.task.device),
            # Any module may have a part in what a quantizer does.
            "code": {"all": hashes.code()}
            if block.task.quantizers
            else sources(*_code(self.hessian)),
        }


def _code(hessian: CacheableHessian) -> list[ModuleType]:
    """Every module that Hessians at float weights are computed by."""
    classes = [sys.modules[kind.__module__] for kind in type(hessian).__mro__]
    ours = [module for module in classes if module.__name__.partition(".")[0] == "qexp"]
    return [*ours, *hessian.code, sys.modules[__name__], walking, capture, task]
