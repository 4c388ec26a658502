"""The same work on the CPU and on a simulated device.

Work that is compared runs under `reference()`: the CPU has kernels that an accelerator has not, and
both then take the same path.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers.pipeline import answer_or_run
from helpers.simulated_device import Counts, counting, simulated
from hydra import compose
from omegaconf import DictConfig, ListConfig, OmegaConf
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from qexp.packed import weights_file
from qexp.quantizers import fake_quantize

DEVICE = "sim:1"
TASKS = ["piqa", "lambada_openai", "gsm8k"]
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "ffn_dim": 64,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
}
LESS = {  # a whole number is at most this
    "steps": 2,
    "epochs": 1,
    "points": 3,
    "group_size": 16,
    "sequences": 2,
    "length": 32,
    "context": 16,
    "stride": 16,
    "prompt": 16,
    "chunk": 8,
    "count": 2,
    "prompt_tokens": 8,
    "limit": 2,
    "rounds": 1,
    "bins": 256,
}


def small(*overrides: str) -> DictConfig:
    """The configuration with a model of two narrow blocks, random text, and few steps of all. Tasks
    of the harness are read from the folder `rows` (`helpers.rows`)."""
    cfg = compose("config", ["data=synthetic", *overrides])
    sizes = cfg.model.sizes
    sizes.update({key: value for key, value in SIZES.items() if key in sizes})
    if "layer_types" in sizes:
        sizes.layer_types = sizes.layer_types[: sizes.num_hidden_layers]
    for key in ("method", "transform", "weight", "activation", "kv", "calibration", "eval"):
        _less(cfg[key])
        for node in _nodes(cfg[key]):
            if "corpus" in node:
                node.corpus = "${data}"
            if "tasks" in node:
                node.update({"tasks": TASKS, "folder": "rows", "source": "local", "bootstrap": 10})
    cfg.data.count = 20
    if "trainer" in cfg:
        cfg.trainer.update({"steps": 2, "sequences": 2, "every": 1})
    return cfg


def _less(node: DictConfig | ListConfig) -> None:
    keys = list(node) if isinstance(node, DictConfig) else range(len(node))
    for key in keys:
        if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
            continue
        value = node[key]
        if isinstance(value, DictConfig | ListConfig):
            _less(value)
        elif key in LESS and (value is None if key == "limit" else type(value) is int):
            node[key] = LESS[key] if value is None else min(value, LESS[key])


def _nodes(node: DictConfig) -> Iterator[DictConfig]:
    """All of them that are written here, and not elsewhere."""
    yield node
    for value in (node._get_node(key) for key in list(node)):
        if isinstance(value, DictConfig) and not value._is_interpolation():
            yield from _nodes(value)


@contextmanager
def reference() -> Iterator[None]:
    """Attention by its formula, rounding of a whole matrix at once, and eigenvalues with their
    vectors, which torch computes for every subclass of Tensor."""
    with pytest.MonkeyPatch.context() as patch, sdpa_kernel(SDPBackend.MATH):
        patch.setattr(fake_quantize, "CHUNK", 2**40)
        patch.setattr(torch.linalg, "eigvalsh", lambda x: torch.linalg.eigh(x).eigenvalues)
        yield


def on_both(folder: Path, cfg: DictConfig, device: str = DEVICE) -> Counts:
    """Runs on the CPU and on `device`, and asserts that metrics and stored weights are equal. The
    value is what the run on the device took."""
    metrics: list[dict[str, float]] = []
    weights: list[dict[str, Tensor]] = []
    for kind in ("cpu", device):
        home = folder / kind.split(":")[0]
        cfg.device = kind
        (home / ".hydra").mkdir(parents=True)
        OmegaConf.save(cfg, home / ".hydra" / "config.yaml")
        with pytest.MonkeyPatch.context() as patch, simulated(), reference():
            patch.setenv("QEXP_CACHE_DIR", str(home / "cache"))
            with counting() as counts:
                metrics.append(answer_or_run(cfg, home))
        stored = home / weights_file.FILE
        weights.append(load_file(stored) if stored.exists() else {})
    # one document has no standard error
    assert metrics[0] == pytest.approx(metrics[1], rel=0, abs=0, nan_ok=True)
    assert weights[0].keys() == weights[1].keys()
    different = [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])]
    assert not different
    assert counts.launches
    return counts
