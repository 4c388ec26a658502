"""What a block-wise method has finished, so that a run killed between blocks goes on there."""

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from qexp import fingerprint, store
from qexp.cache import Cache
from qexp.methods.step import Record

KIND = "blocks"


class Journal:
    """The records of finished blocks, in the cache under everything they depend on."""

    def __init__(self, identity: Mapping[str, Any]) -> None:
        self._cache = Cache()
        self._identity = {**identity, "code": fingerprint.code()}

    def read(self, block: int) -> list[Record] | None:
        """The records of a finished block, or None."""
        found = self._cache.find(KIND, self._key(block))
        if found is None:
            return None
        head = json.loads(bytes(found.pop("head").tolist()))
        packed = store.unflatten(found, head["layout"])
        return [Record(**row, packed=packed[row["name"]]) for row in head["rows"]]

    def write(self, block: int, records: list[Record]) -> None:
        tensors, layout = store.flatten({record.name: record.packed for record in records})
        rows = [
            {each.name: getattr(record, each.name) for each in fields(record)} for record in records
        ]
        for row in rows:
            del row["packed"]
        head = json.dumps({"layout": layout, "rows": rows}).encode()
        tensors["head"] = torch.tensor(list(head), dtype=torch.uint8)
        self._cache.put(KIND, self._key(block), tensors)

    def clear(self, blocks: int) -> None:
        """Forget a run that is finished."""
        for block in range(blocks):
            self._cache.drop(KIND, self._key(block))

    def _key(self, block: int) -> dict[str, Any]:
        return {**self._identity, "block": block}
