"""The harness's index of its tasks, from the cache: building it parses the files of all tasks.

This module imports the harness; import it only where the harness is used.
"""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lm_eval import tasks
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind
from torch import Tensor

from qexp.common.cache import Cache


def entries() -> dict[str, Entry]:
    """Tasks, groups and tags by name, as `TaskManager().task_index` has them.

    The entry of the cache is of one installation of the harness: its version, its folder, and the
    names, sizes and times of its yaml files.
    """
    folder = Path(tasks.__file__).parent
    files = hashlib.sha256()
    for path in sorted(folder.rglob("*.yaml")):
        stat = path.stat()
        files.update(f"{path} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    key = {"lm_eval": version("lm_eval"), "files": files.hexdigest()}
    stored = Cache(together=False).get("harness_tasks", key, _build)["index"]
    text = stored.numpy().tobytes()
    return {name: _entry(name, *fields) for name, fields in json.loads(text).items()}


def _build() -> dict[str, Tensor]:
    index = {name: _fields(entry) for name, entry in TaskManager().task_index.items()}
    return {"index": torch.frombuffer(bytearray(json.dumps(index).encode()), dtype=torch.uint8)}


def _fields(entry: Entry) -> list[Any]:
    path = None if entry.yaml_path is None else str(entry.yaml_path)
    return [entry.kind.name, path, entry.cfg, sorted(entry.tags)]


def _entry(
    name: str, kind: str, path: str | None, cfg: dict[str, Any] | None, tags: list[str]
) -> Entry:
    return Entry(name, Kind[kind], None if path is None else Path(path), cfg, set(tags))
