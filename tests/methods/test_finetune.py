"""Every training method, end to end on tiny models: it learns, and reloads to the same number."""

import csv
from functools import partial
from pathlib import Path

import pytest
from helpers import pipeline

pytestmark = pytest.mark.usefixtures("configured")


SMALL = (
    "model=tiny_llama",
    "data=synthetic",
    "calibration.sequences=8",
    "calibration.length=32",
    "eval.held_out.length=32",
    "eval.held_out.limit=4",
    "trainer=smoke",
    "progress=false",
    "method.optimizer.weights=5e-4",
    "method.validation=${calibration}",
)
PPL = "synthetic_raw_32x4/ppl"


run = partial(pipeline.run, small=SMALL)


def lines(folder: Path) -> list[dict[str, float]]:
    with (folder / "training.csv").open() as file:
        return [{k: float(v) for k, v in line.items() if v} for line in csv.DictReader(file)]


STATIC = ("activation=int8_tensor", "activation.grid.bits=4")


@pytest.mark.parametrize(
    "overrides",
    [
        ("method=qat", "weight.bits=3", "weight.group_size=32"),
        ("method=qat", "weight=nf4", "weight.group_size=32"),
        ("method=qat", "method/scale=static", "weight.group_size=32"),
        ("method=qat", "method/scale=lsq_plus", "weight.group_size=32", *STATIC),
        ("method=qat", "method/trained=norms", "weight.group_size=32"),
        ("method=lsq", "weight.bits=2"),
        ("method=lsq", "weight.per_tensor=true", *STATIC),
        ("method=lsq", "method.trained.offsets=true", *STATIC),
        ("method=lsq", "method/trained=low_rank", "activation=int8_token"),
        ("method=lsq", "method/loss=both"),
        ("method=lsq", "method/loss=hidden_l2"),
        ("method=contapprox", *STATIC),
        ("method=contapprox", "method.clamp.forward=soft", "method.rounding.mode=norm", *STATIC),
        ("method=llm_qat", "method/clamp=llm_qat", "activation=int8_token", "kv=llm_qat"),
        ("method=peqa", "weight.group_size=32", "method.optimizer.scales=1e-3"),
        ("method=pv", "weight.group_size=32", "method.optimizer.scales=1e-3"),
        ("method=dsq",),
        ("method=ewgs", "activation=int8_tensor"),
        ("method=ewgs", "weight=nf4", "weight.group_size=32"),
        ("method=pact", "weight/range=mse", *STATIC),
    ],
    ids=" ".join,
)
def test_it_learns_and_reloads_to_the_same_number(tmp_path, overrides):
    first = run(tmp_path / "first", *overrides)
    curve = lines(tmp_path / "first")
    assert [line["step"] for line in curve] == [4, 8]
    assert curve[-1]["validation"] < curve[0]["validation"]
    assert first["weight/bits"] > 2 and first["weight/count"] > 0
    again = run(
        tmp_path / "again", "model=from_run", f"run={tmp_path / 'first'}", small=["progress=false"]
    )
    assert again[PPL] == first[PPL]
    left = {path.name for path in (tmp_path / "first").iterdir()}
    assert not any(name.startswith(("training-", "lightning")) for name in left)


def test_efficient_qat_trains_blocks_then_scales(tmp_path):
    small = [key for key in SMALL if not key.startswith("method.")]
    small += ["method=efficient_qat", "weight.bits=2", "weight.group_size=32"]
    first = run(tmp_path / "first", small=small)
    reload = ["model=from_run", f"run={tmp_path / 'first'}"]
    assert run(tmp_path / "again", *reload, small=["progress=false"])[PPL] == first[PPL]
    assert first["weight/bits"] == 2 + (16 + 2) / 32
