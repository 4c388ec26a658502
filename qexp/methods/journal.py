"""Journal of finished blocks, from which a killed block-wise run resumes."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qexp.common import hashes
from qexp.common.cache import Cache, plain
from qexp.common.on_disk import assign
from qexp.packed import weights_file
from qexp.packed.shelved import Shelved
from qexp.step import Record
from qexp.task import Task

KIND = "blocks"
OTHER = "other/"

log = logging.getLogger(__name__)


class Finished(NamedTuple):
    """A finished block: records of its linears, its other changed parameters, its training log."""

    records: list[Record]
    others: dict[str, Tensor]
    log: list[dict[str, float | int | str]]

    @torch.no_grad()
    def restore(self, task: Task) -> None:
        for record in self.records:
            weight = task.model.get_submodule(record.name).weight
            assign(weight, record.packed.dequantize())
        for name, tensor in self.others.items():
            task.model.get_parameter(name).copy_(tensor)


class Journal:
    """Finished blocks in the cache, keyed by everything that they depend on."""

    def __init__(self, identity: Mapping[str, Any]) -> None:
        self._cache = Cache()
        self._identity = {**identity, "code": hashes.code()}

    def read(self, block: int) -> Finished | None:
        """The finished block with this index, or None."""
        found = self._cache.find(KIND, self._key(block))
        if found is None:
            return None
        return unpacked_block(found, disk=True)

    def finished(self, blocks: int, per_pass: int) -> list[Finished]:
        """The blocks that an interrupted run finished, of `blocks`, up to a multiple of `per_pass`,
        from which it can go on."""
        found: list[Finished] = []
        for index in range(blocks):
            if (block := self.read(index)) is None:
                break
            found.append(block)
        found = found[: len(found) // per_pass * per_pass]
        if found:
            log.info("taken up again at block %d of %d", len(found), blocks)
        return found

    def write(
        self,
        block: int,
        records: list[Record],
        others: Mapping[str, Tensor] = MappingProxyType({}),
        log: Sequence[Mapping[str, float | int | str]] = (),
    ) -> None:
        self._cache.put(KIND, self._key(block), packed_block(records, others, log))

    def clear(self, blocks: int) -> None:
        """Remove the blocks of a finished run."""
        for block in range(blocks):
            self._cache.drop(KIND, self._key(block))

    def _key(self, block: int) -> dict[str, Any]:
        return {**self._identity, "block": block}


def packed_block(
    records: Sequence[Record],
    others: Mapping[str, Tensor] = MappingProxyType({}),
    log: Sequence[Mapping[str, float | int | str]] = (),
) -> dict[str, Tensor]:
    """Records, other parameters and training log of a block as tensors on the CPU."""
    tensors, layout = weights_file.flatten({record.name: record.packed for record in records})
    rows = [
        {each.name: getattr(record, each.name) for each in fields(record)} for record in records
    ]
    for row in rows:
        del row["packed"]
    head = json.dumps({"layout": layout, "rows": rows, "log": list(log)}).encode()
    tensors |= {OTHER + name: tensor for name, tensor in others.items()}
    tensors["head"] = torch.tensor(list(head), dtype=torch.uint8)
    return plain(tensors)


def unpacked_block(tensors: dict[str, Tensor], disk: bool = False) -> Finished:
    """What `packed_block` made tensors of. disk: stored forms are kept in mapped files."""
    head = json.loads(bytes(tensors.pop("head").tolist()))
    packed = weights_file.unflatten(tensors, head["layout"])
    kept = {name: Shelved.of(form, disk) for name, form in packed.items()}
    records = [Record(**row, packed=kept[row["name"]]) for row in head["rows"]]
    others = {k.removeprefix(OTHER): t for k, t in tensors.items() if k.startswith(OTHER)}
    return Finished(records, others, head["log"])
