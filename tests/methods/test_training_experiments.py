"""The experiments of training: every job composes, and some of each run in small."""

import json

import pytest
from helpers.experiments import jobs
from hydra import compose
from omegaconf import DictConfig

from qexp import pipeline
from qexp.runs import results
from qexp.runs.signature import signature

pytestmark = pytest.mark.usefixtures("configured")


EXPERIMENTS = ("contapprox_2x2", "contapprox_apart", "contapprox_temperature", "qat_zoo")
SMALL = (
    "model=tiny_llama",
    "data=synthetic",
    "calibration.sequences=4",
    "calibration.length=32",
    "weight.group_size=null",
    "trainer.steps=2",
    "trainer.every=2",
    "progress=false",
)
MEASURE = ("eval=held_out", "eval.held_out.length=32", "eval.held_out.limit=2")


def small(experiment: str, *overrides: str, measure: tuple[str, ...] = MEASURE) -> DictConfig:
    length = () if experiment == "qat_zoo" else ("method.train.length=32",)
    return compose("config", [f"experiment={experiment}", *SMALL, *length, *measure, *overrides])


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_jobs_compose_and_differ_on_one_grid(experiment):
    found = [small(experiment, *job) for job in jobs(experiment)]
    assert len({signature(cfg) for cfg in found}) == len(found) >= 3
    assert all(cfg.weight == found[0].weight for cfg in found)


@pytest.mark.parametrize(
    ("experiment", "job"),
    [
        ("contapprox_2x2", ("method/rounding=straight", "method/clamp=hard")),
        ("contapprox_2x2", ("method/rounding=sigmoid", "method/clamp=soft", "weight.bits=3")),
        ("contapprox_temperature", ("method.rounding.mode=mean",)),
        (
            "contapprox_apart",
            ("method/rounding=sigmoid", "+method/rounding@method.activation_rounding=straight"),
        ),
        ("qat_zoo", ("method=gptq",)),
        ("qat_zoo", ("method=efficient_qat",)),
    ],
    ids=str,
)
def test_a_job_runs(tmp_path, experiment, job):
    made = pipeline.run(small(experiment, *job), tmp_path)
    assert made["synthetic_raw_32x2/ppl"] > 1 and made["weight/bits"] > 2


def test_data_of_a_method_s_own_is_in_provenance_and_decides_whether_a_run_is_stale(
    tmp_path, monkeypatch
):
    text = tmp_path / "text.txt"
    text.write_text("what a method trains on " * 40)
    cfg = small(
        "contapprox_2x2",
        "data=local",
        f"data.path={text}",
        "calibration=synthetic",
        "+calibration@method.validation=first",
        "method.validation.length=32",
        "method.validation.sequences=2",
        measure=("eval=none",),
    )
    first = pipeline.run(cfg, tmp_path / "run")
    past = json.loads((tmp_path / "run" / results.PROVENANCE).read_text())
    assert past["training"]["train"]["sampling"] == "shuffled"
    assert past["training"]["validation"]["corpus"]["sha256"]
    assert str(text) in past["inputs"]
    with monkeypatch.context() as patch:
        patch.setattr("qexp.methods.finetune.FineTune.tune", lambda *_: pytest.fail("ran again"))
        answer = pipeline.answer(cfg, tmp_path / "run")
        assert answer is not None and answer.metrics == first
    text.write_text("other words " * 80)
    assert str(text) in str(results.stale(tmp_path / "run"))


def test_llm_qat_trains_on_what_the_float_model_says(tmp_path):
    generated = ("+calibration@method.train=generated", "method.train.length=16")
    shrunk = ("method.train.sequences=4", "trainer.sequences=2")
    cfg = small("qat_zoo", "method=llm_qat", *generated, *shrunk)
    pipeline.run(cfg, tmp_path)
    past = json.loads((tmp_path / results.PROVENANCE).read_text())
    assert past["training"]["train"]["greedy"] == [3, 4, 5]
