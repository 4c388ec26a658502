"""The cost of outliers: the decomposition adds up, and it finds the tensor that was spoiled."""

import csv

import pytest
import torch
from helpers.models import FAMILIES, batches, joined, task_of
from helpers.pipeline import run
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from qexp.cli import command
from qexp.commands.outliers import problems, survey
from qexp.config import location
from qexp.grid import IntGrid
from qexp.grid.outlier_error import Errors, Moments, decompose
from qexp.quantizers.placement import AllOps, LinearInputs
from qexp.quantizers.scheme import QuantizedActivations
from qexp.runs import resolvers

GRID = IntGrid(6, per_tensor=True)
KIND = QuantizedActivations(LinearInputs(), GRID)


def moments_of(x: torch.Tensor, parts: int = 1) -> Moments:
    moments = Moments()
    for part in x.chunk(parts):
        moments.add(part)
    return moments


def spoiled(outlier: float) -> torch.Tensor:
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    x[7] = outlier
    return x


@pytest.mark.parametrize("outlier", [0.0, 8.0, 50.0])
def test_the_parts_are_those_of_the_definition_and_add_up(outlier):
    x = spoiled(outlier)
    found = decompose(x, moments_of(x), GRID, 3.0)
    inside = (x - x.double().mean()).abs() <= 3 * x.double().std(correction=0)
    ends = [
        x.double().mean() + sign * 3 * x.double().std(correction=0) for sign in (-1, 1)
    ]  # the inliers' range, where the tensor reaches so far
    narrow = torch.stack([ends[0].clamp(min=x.min()), ends[1].clamp(max=x.max())])
    whole = GRID.fit(x[None])
    alone = GRID.fit(narrow[None].float())
    error = (GRID.round(x[None], whole)[0] - x).double().square()
    inlier = (GRID.round(x[None], alone)[0] - x).double().square()[inside].sum()
    assert found.total == pytest.approx(float(error.sum()))
    assert found.inlier == pytest.approx(float(inlier), rel=1e-4)
    assert found.outlier == pytest.approx(float(error[~inside].sum()))
    assert found.total == pytest.approx(found.inlier + found.range + found.outlier, rel=1e-12)
    assert found.outliers == int((~inside).sum())
    assert found.share > 0.9 if outlier == 50 else found.share < 0.9


def test_moments_and_errors_of_parts_are_those_of_the_whole():
    x = spoiled(20.0)
    whole, parts = moments_of(x), moments_of(x, 7)
    assert (parts.count, parts.low, parts.high) == (whole.count, whole.low, whole.high)
    assert parts.mean == pytest.approx(float(x.double().mean()))
    assert parts.deviation == pytest.approx(float(x.double().std(correction=0)))
    summed = Errors()
    for part in x.chunk(7):
        summed = summed.plus(decompose(part, parts, GRID, 3.0))
    assert summed == pytest.approx(decompose(x, whole, GRID, 3.0), rel=1e-6)


def test_without_outliers_the_range_costs_nothing():
    x = torch.rand(500)
    found = decompose(x, moments_of(x), GRID, 3.0)
    assert found.range == found.outlier == found.outliers == 0 < found.inlier


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_adds_up(family):
    rows = survey(task_of(family), [joined(family)], KIND)
    assert len(rows) == 3 * len(task_of(family).arch.groups)
    for row in rows:
        parts = row.errors.inlier + row.errors.range + row.errors.outlier
        assert row.errors.total == pytest.approx(parts, rel=1e-9) and row.errors.total > 0


def test_the_spoiled_tensor_is_named():
    task = task_of("opt")
    with torch.no_grad():
        task.blocks[1].fc1.bias[5] = 500.0
    rows = survey(task, batches("opt"), QuantizedActivations(AllOps(), GRID))
    found = [row.name for row in problems(rows)]
    names = ("fc1.output", "fc2.input")
    assert set(found[:2]) == {f"model.decoder.layers.1.{name}" for name in names}


SMALL = ("model=tiny_vit", "calibration=synthetic", "weight=channel")


def test_the_script_compares_a_model_with_what_a_run_made_of_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("QEXP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(GlobalHydra.instance(), "hydra", None)
    resolvers.register()
    words = [*SMALL, "data=synthetic"]
    with initialize_config_dir(version_base="1.3", config_dir=str(location.conf())):
        run(tmp_path / "run", "method=quanttune", "trainer=smoke", "eval=none", small=words)
    words += ["--", "model=from_run", f"run={tmp_path / 'run'}"]
    assert command("outliers", [str(tmp_path / "out"), *words]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("before.csv", "before.md", "after.csv", "after.md", "ranges.png"),
        *("before_statistics.csv", "after_statistics.csv"),
    }
    with (tmp_path / "out" / "before_statistics.csv").open() as file:
        found = {(row["statistic"], row["tensor"]): row["value"] for row in csv.DictReader(file)}
    names = {name for name, _ in found}
    assert names == {"reach", "kurtosis", "top_channel", "error8", "flatness", "gain_std"}
    assert "| gain_std |" in (tmp_path / "out" / "after.md").read_text()
    with (tmp_path / "out" / "before.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    for row in rows:
        assert sum(float(row[key]) for key in ("inlier", "range", "outlier")) == pytest.approx(1)
    assert "on average over 12 tensors" in capsys.readouterr().out
    assert (tmp_path / "out" / "after.csv").read_text() != (
        tmp_path / "out" / "before.csv"
    ).read_text()


def test_faults_of_the_user_are_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(GlobalHydra.instance(), "hydra", None)
    assert command("outliers", ["model=tiny_vit"]) == 1
    assert command("outliers", [str(tmp_path), *SMALL, "activation=int8_token"]) == 1
    assert "choose activation=int8_tensor" in capsys.readouterr().err
    assert command("outliers", [str(tmp_path), "model=nowhere"]) == 1
    assert "there is no such choice" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
