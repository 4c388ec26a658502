"""Every yaml of a solver, from configuration to a quantized model and back from its file."""

import re

import pytest
import torch
from helpers.models import joined, task_of
from hydra import compose
from hydra.errors import HydraException
from omegaconf import OmegaConf

from qexp import pipeline
from qexp.common.errors import UserError
from qexp.config import grid_choice, messages
from qexp.config.instantiate import instantiate
from qexp.methods.blockwise import Blockwise
from qexp.packed import weights_file

pytestmark = pytest.mark.usefixtures("configured")


METHODS = {
    "spqr": ["weight.bits=2", "weight.group_size=32"],
    "spqr one level": ["weight.scales=null", "weight.zeros=null", "method.solver.threshold=inf"],
    "billm": [],
    "pbllm": [],
    "quip": [],
    "gptq": ["weight=spqr", "method.solver.damp=0.1"],
    "rtn": ["weight=spqr"],
    "gptq dgq": ["weight=dgq", "weight.group_size=32"],
    "yaqa": ["weight.group_size=32"],
    "gptq by rows": ["method/hessian=token_one_pass", "method.hessian.groups=4", "weight.bits=3"],
    "lorc": [],
    "slim": ["method.residual.rank=0.25"],
    "gptq low rank": ["method/residual=low_rank", "method.residual.factors=int4"],
    "gptq refined": [
        "method.solver.descend=1",
        "method.solver.refit=true",
        "method.solver.importance=diagonal",
        "weight/range=mse",
        "weight.range.steps=10",
        "weight.bits=3",
        "weight.group_size=32",
    ],
    "qronos": ["weight.bits=3", "weight.group_size=32"],
    "qronos low rank": [
        "weight.bits=3",
        "weight.group_size=32",
        "method/residual=low_rank",
        "method.residual.rounds=2",
    ],
    "obq": ["weight=channel", "weight.bits=3"],
    "squeezellm": [],
    "squeezellm dense": ["method.solver.outliers=0", "method.solver.sensitive=0"],
    "squeezellm without gradients": ["method/hessian=layerwise"],
    "lnq": [],
    "lnq by rows": ["method.hessian.groups=4"],
    "lnq of the output": ["method/hessian=output", "method.solver.bits=2"],
    "owq": ["weight.bits=3", "weight.group_size=32", "weight/range=mse"],
    "sparsegpt": ["weight.group_size=null"],
    "sparsegpt alone": [
        "weight=built_in",
        "method.solver.grid=null",
        "method.solver.pattern=[2,4]",
    ],
    "slim_llm": ["weight.bits=2", "weight.group_size=16", "weight/range=minmax"],
    "adpq": ["weight=channel"],
}


def method(name: str):
    return instantiate(compose("config", [f"method={name.split()[0]}", *METHODS[name]]).method)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *(("llama", name) for name in METHODS),
        *((family, "spqr") for family in ("gpt2", "opt", "bert", "vit")),
    ],
)
def test_solves_every_linear_and_comes_back(family: str, name: str, tmp_path) -> None:
    task, step = task_of(family), method(name)
    records = step(task, lambda: [joined(family)])
    assert [record.name for record in records] == list(task.linears())
    weights_file.save(tmp_path, {record.name: record.packed for record in records}, {})
    packed, _ = weights_file.load(tmp_path)
    for record in records:
        weight = task.model.get_submodule(record.name).weight
        assert torch.equal(packed[record.name].dequantize(), weight)
        assert packed[record.name].bits() == record.bits
    metrics = pipeline.storage(records)
    paper = ("spqr", "billm", "pbllm", "owq", "sparsegpt", "slim_llm")
    if name.split()[0] in paper and name != "sparsegpt alone":  # which has no scales
        assert 1 < metrics["weight/paper_bits"] < metrics["weight/bits"]
    if isinstance(step, Blockwise):
        before = sum(record.error_before for record in records)
        assert sum(record.error for record in records) < 0.8 * before


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *((name, "solver.damp=-0.1") for name in ("gptq", "spqr", "billm", "pbllm", "quip")),
        *((name, "solver.block=0") for name in ("gptq", "spqr", "billm", "pbllm", "quip")),
        ("gptq", "solver.damp=nan"),
        ("gptq", "solver.fit_every=0"),
        ("gptq", "solver.descend=-1"),
        ("gptq", "solver.importance=fisher"),
        ("gptq", "solver.refit=maybe"),
        ("spqr", "solver.importance=fisher"),
        ("quip", "solver.importance=fisher"),
        ("obq", "solver.damp=-0.1"),
        ("obq", "solver.rows=0"),
        ("obq", "solver.importance=fisher"),
        ("qronos", "target.first_column=maybe"),
        ("gptq", "chunk=0"),
        ("spqr", "solver.threshold=-1.0"),
        ("spqr", "solver.outlier_dtype=int8"),
        ("billm", "solver.most_salient=0"),
        ("billm", "solver.search=both"),
        ("billm", "solver.feedback=all"),
        ("billm", "solver.salient_metric=mean"),
        ("billm", "solver.scale_dtype=float8"),
        ("pbllm", "solver.salient=1.5"),
        ("pbllm", "solver.salient=-0.1"),
        ("pbllm", "solver.salient_metric=mean"),
        ("pbllm", "solver.scale_dtype=float8"),
        ("quip", "solver.greedy=-1"),
        *(("squeezellm", f"solver.bits={bits}") for bits in (1, 9)),
        ("squeezellm", "solver.steps=0"),
        ("squeezellm", "solver.sensitive=-0.1"),
        ("squeezellm", "solver.outliers=1.5"),
        ("squeezellm", "solver.scale_dtype=float8"),
        ("squeezellm", "hessian.k=0"),
        ("lnq", "solver.bits=1"),
        ("lnq", "solver.rounds=-1"),
        ("lnq", "solver.cycles=0"),
        ("lnq", "solver.damp=-0.1"),
        ("owq", "solver.extra=1.0"),
        ("owq", "solver.columns=-1"),
        ("sparsegpt", "solver.sparsity=1.0"),
        ("sparsegpt", "solver.score=mean"),
        ("slim_llm", "solver.metric=mean"),
        ("slim_llm", "solver.step=0"),
        ("adpq", "solver.outliers=1.0"),
        ("oac", "hessian.k=0"),
        ("oac", "hessian.sequences=0"),
        ("oac", "hessian.sequences=true"),
        ("oac", "hessian.memory=-1.0"),
        ("oac", "hessian.loss_scale=0.0"),
        ("oac", "hessian.loss_scale=inf"),
        ("oac", "hessian.loss_scale=-1024.0"),
        ("oac", "hessian.schedule=never"),
        ("oac", "hessian.labels=all"),
        ("oac", "hessian.dtype=int8"),
    ],
)
def test_what_cannot_be_is_refused_before_any_model_is_loaded(name: str, wrong: str) -> None:
    cfg = compose("config", [f"method={name}", f"method.{wrong}"])
    with pytest.raises(UserError) as refusal:
        instantiate(cfg.method)
    key = re.escape(wrong.partition("=")[0])
    said = str(refusal.value)
    assert re.fullmatch(rf"method\.{key}=\S+ ?[a-z ]*: give [^.]+\.", said), said


def test_a_grid_that_nothing_reads_is_refused() -> None:
    for name in ("billm", "pbllm", "oac_binary", "squeezellm", "lnq"):
        cfg = compose("config", [f"method={name}"])
        assert cfg.weight == grid_choice.BUILT_IN
        grid_choice.check(cfg)
        with pytest.raises(HydraException) as refusal:
            compose("config", [f"method={name}", "weight.bits=3"])
        said = messages.message_for(refusal.value)
        assert said.startswith("weight.bits: ") and "weight has no settings" in said
        with pytest.raises(UserError, match=r"weight: \w+ defines its own values"):
            grid_choice.check(compose("config", [f"method={name}", "weight=nf4"]))
    with pytest.raises(UserError, match="weight=built_in: a grid is needed"):
        instantiate(compose("config", ["method=gptq", "weight=built_in"]).method)
    with pytest.raises(UserError, match="weight=built_in: a grid is needed"):
        instantiate(compose("config", ["method=billm", "transform=awq"]).transform)


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=rtn"],
        ["method=oac", "weight=spqr"],
        ["method=quip"],
        ["method=none"],
        ["method=lsq"],
        ["method=billm", "weight=int", "transform=awq"],
        ["method=efficient_qat"],
    ],
    ids=" ".join,
)
def test_a_grid_that_something_reads_is_not(overrides: list[str]) -> None:
    cfg = compose("config", overrides)
    grid_choice.check(cfg)
    OmegaConf.resolve(cfg.method)
    grid_choice.check(cfg)


def test_the_second_level_follows_the_weights_settings() -> None:
    cfg = compose("config", ["method=spqr", "weight.bits=2", "weight.scale_dtype=bfloat16"])
    grid = instantiate(cfg.method).solver.grid
    assert grid.bits == 2 and grid.scales.bits == 3
    assert grid.scale_dtype == grid.zeros.scale_dtype == "bfloat16"
    plain = instantiate(compose("config", ["method=spqr", "weight=int"]).method).solver.grid
    assert not plain.second_level
