"""The experiments of QuantTune: every job composes, and one of each kind of model runs in small."""

import pytest
from helpers.experiments import jobs
from hydra import compose

from qexp import pipeline
from qexp.runs.signature import signature

pytestmark = pytest.mark.usefixtures("configured")


MODELS = ("sst2", "cifar10", "smollm2")
SMALL = (
    "data=synthetic",
    "calibration.sequences=4",
    "calibration.length=32",
    "method.training.train.length=32",
    "trainer.steps=2",
    "trainer.sequences=4",
    "trainer.every=2",
    "progress=false",
)


@pytest.mark.parametrize("model", MODELS)
def test_jobs_compose_and_differ(model):
    experiment = f"quanttune_{model}"
    found = [compose("config", [f"experiment={experiment}", *job]) for job in jobs(experiment)]
    assert len({signature(cfg) for cfg in found}) == len(found) == 1 + 1 + 2 + 6
    for cfg in found:
        assert cfg.weight.bits == cfg.activation.grid.bits and not cfg.activation.dynamic
        assert cfg.method.training.weight is None and not cfg.method.training.activations
    floats = [compose("config", [f"experiment={experiment}_float", f"seed={s}"]) for s in (0, 1)]
    assert len({signature(cfg) for cfg in floats}) == 2
    assert "Nothing" in floats[0].method.quantization._target_


@pytest.mark.parametrize(
    ("experiment", "overrides"),
    [
        ("quanttune_sst2", ("model=tiny_bert_classifier", "activation/grid/range=entropy")),
        ("quanttune_sst2_float", ("model=tiny_bert_classifier",)),
        ("quanttune_cifar10", ("model=tiny_vit", "activation/grid/range=mse")),
        ("quanttune_smollm2", ("model=tiny_llama", "method@method.quantization=none")),
        ("small_vit", ("model=tiny_vit",)),
    ],
)
def test_a_job_runs(tmp_path, monkeypatch, experiment, overrides):
    monkeypatch.setenv("QEXP_CACHE_DIR", str(tmp_path / "cache"))
    small = [word.replace(".training", "") if experiment == "small_vit" else word for word in SMALL]
    measure = ("eval=accuracy",)
    if experiment == "quanttune_smollm2":
        measure = ("eval=held_out", "eval.held_out.length=32", "eval.held_out.limit=2")
    cfg = compose("config", [f"experiment={experiment}", *small, *measure, *overrides])
    made = pipeline.run(cfg, tmp_path)
    assert (tmp_path / "training.csv").exists()
    assert made.get("synthetic_test/acc", 0.5) >= 0 and made.get("synthetic_raw_32x2/ppl", 2) > 1
    assert len(made) > 2
