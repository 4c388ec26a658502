"""Every yaml of a solver, from configuration to a quantized model and back from its file."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from test_walk import joined, task_of

from qexp import cli, pipeline, resolvers, store
from qexp.build import build
from qexp.methods.blockwise import Blockwise

METHODS = {
    "spqr": ["weight.bits=2", "weight.group_size=32"],
    "spqr one level": ["weight.scales=null", "weight.zeros=null", "method.solver.threshold=inf"],
    "billm": [],
    "pbllm": [],
    "quip": [],
    "gptq": ["weight=spqr", "method.solver.damp=0.1"],
    "rtn": ["weight=spqr"],
}


@pytest.fixture(scope="module", autouse=True)
def _configured():
    resolvers.register()
    with initialize_config_dir(version_base="1.3", config_dir=str(cli.conf())):
        yield


def method(name: str):
    cfg = compose("config", [f"method={name.split()[0]}", *METHODS[name]])
    return build(cfg.method)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "bert", "vit"])
@pytest.mark.parametrize("name", METHODS)
def test_solves_every_linear_and_comes_back(family: str, name: str, tmp_path) -> None:
    task, step = task_of(family), method(name)
    records = step(task, lambda: [joined(family)])
    assert [record.name for record in records] == list(task.linears())
    store.save(tmp_path, {record.name: record.packed for record in records}, {})
    packed, _ = store.load(tmp_path)
    for record in records:
        weight = task.model.get_submodule(record.name).weight
        assert torch.equal(packed[record.name].dequantize(), weight)
        assert packed[record.name].bits() == record.bits
    metrics = pipeline.storage(records)
    if name.split()[0] in ("spqr", "billm", "pbllm"):
        assert 1 < metrics["weight/paper_bits"] < metrics["weight/bits"]
    if isinstance(step, Blockwise):
        before = sum(record.error_before for record in records)
        assert sum(record.error for record in records) < 0.8 * before


def test_the_second_level_follows_the_weights_settings() -> None:
    cfg = compose("config", ["method=spqr", "weight.bits=2", "weight.scale_dtype=bfloat16"])
    grid = build(cfg.method).solver.grid
    assert grid.bits == 2 and grid.scales.bits == 3
    assert grid.scale_dtype == grid.zeros.scale_dtype == "bfloat16"
    plain = build(compose("config", ["method=spqr", "weight=int"]).method).solver.grid
    assert not plain.second
