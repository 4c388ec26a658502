"""Tiny random models of every family, and batches for them."""

import os
from pathlib import Path

import torch
from omegaconf import OmegaConf

from qexp.config.instantiate import instantiate
from qexp.models.base import Loaded

CONF = Path(__file__).parents[1] / "conf"
FAMILIES = (
    "gpt2",
    "opt",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gpt_neox",
    "gemma3",
    "bert",
    "vit",
)
DECODERS = tuple(family for family in FAMILIES if family not in ("bert", "vit"))


def tiny(family: str, seed: int = 0, **fields: object) -> Loaded:
    """The three-block random model of conf/model/tiny_<family>.yaml."""
    node = OmegaConf.load(CONF / "model" / f"tiny_{family}.yaml")
    node = OmegaConf.merge(node, {"seed": seed, **fields})
    loaded = instantiate(node).load()
    assert isinstance(loaded, Loaded)
    return loaded


def batches(family: str, count: int = 2, rows: int = 2, length: int = 24) -> list[dict]:
    """Seeded random batches: token ids (for bert with labels on 15 % of them), or images."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        if family == "vit":
            pixels = torch.randn(rows, 3, 32, 32, generator=generator)
            labels = torch.randint(10, (rows,), generator=generator)
            made.append({"pixel_values": pixels, "labels": labels})
            continue
        ids = torch.randint(256, (rows, length), generator=generator)
        if family != "bert":
            made.append({"input_ids": ids})
            continue
        masked = torch.rand(ids.shape, generator=generator) < 0.15
        masked[:, 0] = True  # at least one token per row to predict
        labels = ids.where(masked, -100)
        made.append({"input_ids": ids.masked_fill(masked, 259), "labels": labels})
    return made


def data_dir() -> Path | None:
    """The folder of real data, where this machine has one; tests that read it are extra."""
    named = os.environ.get("QEXP_DATA_DIR")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"
    return folder if folder.is_dir() else None
