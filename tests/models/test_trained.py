"""Trained float models: what their run left, compared with themselves, refused where missing."""

import csv
from pathlib import Path

import pytest
from helpers.pipeline import PPL, run

from qexp.common.errors import UserError
from qexp.models.trained import Trained
from qexp.runs import finished, results

TUNE = ("progress=false", "method=finetune", "method/loss=logit_kl", "trainer=smoke")
FILE_GRID = ("method=rtn", "weight.real_zero=true", "weight.group_size=32")


def trained(folder: Path) -> Trained:
    return Trained(str(folder), "qexp experiment=mine")


def losses(folder: Path) -> list[float]:
    with (folder / results.TRAINING).open() as file:
        return [float(line["loss"]) for line in csv.DictReader(file)]


@pytest.mark.usefixtures("configured")
def test_a_dithered_model_is_trained_towards_its_source_and_read_as_float(tmp_path):
    run(tmp_path / "file", "model=tiny_llama", "progress=false", *FILE_GRID)
    quantized = ("model=from_run", f"run={tmp_path / 'file'}", "transform=dither", *TUNE)
    made = tmp_path / "made" / "0123abcd"
    after = run(made, *quantized, "method.teacher=source", small=[])
    run(tmp_path / "start", *quantized, small=[])
    # the first interval: against itself a model is at 0, against the source it is not
    assert losses(made)[0] > 10 * losses(tmp_path / "start")[0]

    chosen = ("model=smollm2_float", f"model.folder={made.parent}", "progress=false")
    again = run(tmp_path / "again", *chosen, "method=none")
    assert again[PPL] == after[PPL]
    source = trained(made.parent)
    assert source.origin() is source and source.tensor_types() == {}
    assert source.fingerprint().items() >= {"dtype": "float32"}.items()
    recorded = results.provenance(tmp_path / "again")["model"]
    assert recorded == source.fingerprint() and results.WEIGHTS in recorded
    assert source.fingerprint() == trained(made).fingerprint()
    assert source.files() == trained(made).files()


def test_a_missing_model_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(UserError) as refusal:
        trained(tmp_path / "none").files()
    assert str(refusal.value) == (
        f"model.folder: {tmp_path / 'none'} holds no finished run; make it by: qexp experiment=mine"
    )


@pytest.mark.usefixtures("configured")
def test_runs_that_are_not_the_one_float_model_are_refused(tmp_path):
    one = ("model=tiny_llama", "progress=false")
    run(tmp_path / "coded", *one, "method=rtn")
    with pytest.raises(UserError, match=r"holds quantized weights; load it by model=from_run"):
        trained(tmp_path).loaded()
    run(tmp_path / "bare", *one, "method=none", "save_weights=false")
    with pytest.raises(UserError, match=r"bare has no weights\.safetensors; make it by"):
        trained(tmp_path / "bare").loaded()
    with pytest.raises(UserError, match=r"holds 2 finished runs; .*model\.folder=.*bare"):
        trained(tmp_path).loaded()


def test_a_run_of_it_is_a_float_baseline():
    run = finished.Run(Path(), {"model": "smollm2_float"}, {}, {}, (), {}, {})
    assert run.is_float
