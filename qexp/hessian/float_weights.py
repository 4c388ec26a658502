"""Hessians at float weights, measured once and shared between jobs through the cache."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor

from qexp import task
from qexp.common.cache import Cache, sources
from qexp.common.errors import UserError
from qexp.hessian.base import CacheableHessian, Hessian, OnHessian
from qexp.walk import Block, capture
from qexp.walk import blocks as walking

KIND = "hessians"


@dataclass(frozen=True)
class AtFloatWeights(Hessian):
    """Those of `source` where nothing that is rounded is felt by another layer.

    They depend on no grid and no solver, so they are kept in the cache for other jobs. One that
    wants them while another measures waits for it.
    """

    hessian: CacheableHessian

    @property
    def blocks_per_pass(self) -> int:
        return 1

    @property
    def is_precomputed(self) -> bool:
        return True

    def prepare(self, first: Block) -> None:
        cache, missing, room = Cache(), [], self.hessian.memory * 2**30

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
            for index, own in self.hessian.measure(first, missing) if missing else ():
                kept = cache.put(KIND, self._key(first, index), own)
                hold(index, own, kept)

    def for_each_group(self, block: Block, solve: OnHessian) -> None:
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
            "hessian": type(self.hessian).__name__,
            **self.hessian.identity(block),
            "content": block.origin,
            "block": index,
            "device": block.task.device.type,
            "code": sources(*_code(self.hessian)),
        }


def _code(source: CacheableHessian) -> list[ModuleType]:
    """Every module that Hessians at float weights are made by."""
    classes = [sys.modules[kind.__module__] for kind in type(source).__mro__]
    own = [module for module in classes if module.__name__.partition(".")[0] == "qexp"]
    return [*own, *source.code, sys.modules[__name__], walking, capture, task]


def _prefix(block: Block, index: int) -> str:
    """Of the notes on a block's Hessians."""
    return f"{block.task.arch.blocks}.{index} "
