"""Tiny random models of every family, and batches for them."""

import os
from pathlib import Path

import torch
from omegaconf import OmegaConf

from qexp.common.workspace import Workspace
from qexp.config.instantiate import instantiate
from qexp.models.base import Loaded
from qexp.task import TASKS, Task

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"


def _objectives() -> dict[str, str]:
    """The objective of every conf/model/tiny_FAMILY.yaml of a family that qexp.arch knows."""
    found = {}
    for path in sorted((CONF / "model").glob("tiny_*.yaml")):
        node = OmegaConf.load(path)
        if "family" in node:  # a head on another tiny model is no family
            found[path.stem.removeprefix("tiny_")] = str(node.objective)
    return found


OBJECTIVES = _objectives()
FAMILIES = tuple(OBJECTIVES)
DECODERS = tuple(family for family in FAMILIES if OBJECTIVES[family] == "causal_lm")


def tiny(family: str, seed: int = 0, **fields: object) -> Loaded:
    """The three-block random model of conf/model/tiny_<family>.yaml."""
    node = OmegaConf.load(CONF / "model" / f"tiny_{family}.yaml")
    node = OmegaConf.merge(node, {"seed": seed, **fields})
    loaded = instantiate(node).loaded()
    assert isinstance(loaded, Loaded)
    return loaded


def task_of(family: str = "llama", folder: Path | None = None) -> Task:
    """The tiny model as a task; `folder`: of its run."""
    loaded = tiny(family)
    task = TASKS[OBJECTIVES[family]](loaded.model, loaded.tokenizer).eval()
    task.workspace = Workspace(folder)
    return task


def batches(family: str, count: int = 2, rows: int = 2, length: int = 24) -> list[dict]:
    """Seeded random batches: token ids (for masked models with labels on 15 %), or images."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        if OBJECTIVES[family] == "image_classification":
            pixels = torch.randn(rows, 3, 32, 32, generator=generator)
            labels = torch.randint(10, (rows,), generator=generator)
            made.append({"pixel_values": pixels, "labels": labels})
            continue
        ids = torch.randint(256, (rows, length), generator=generator)
        if OBJECTIVES[family] != "masked_lm":
            made.append({"input_ids": ids})
            continue
        masked = torch.rand(ids.shape, generator=generator) < 0.15
        masked[:, 0] = True  # at least one token per row to predict
        labels = ids.where(masked, -100)
        made.append({"input_ids": ids.masked_fill(masked, 259), "labels": labels})
    return made


def joined(family: str) -> dict[str, torch.Tensor]:
    """The batches of a family as one."""
    parts = batches(family)
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


@torch.no_grad()
def block_outputs(task: Task, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """What every block returns in a plain forward."""
    seen: list[torch.Tensor] = []
    handles = [
        block.register_forward_hook(
            lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        for block in task.blocks
    ]
    task.encode(batch)
    for handle in handles:
        handle.remove()
    return seen


def data_dir() -> Path | None:
    """The folder of real data, where this machine has one; tests that read it are extra."""
    named = os.environ.get("QEXP_DATA_DIR")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    return folder if folder.is_dir() else None
