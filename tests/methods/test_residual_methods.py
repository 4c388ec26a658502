"""Low-rank residuals, frozen parts and sparse updates in whole runs, which reload."""

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
)
PPL = "synthetic_raw_32x4/ppl"
G32 = "weight.group_size=32"
run = partial(pipeline.run, small=SMALL)


@pytest.mark.parametrize(
    "overrides",
    [
        ("method=qlora", G32, "method.adapter.rank=4", "method.optimizer.weights=1e-3"),
        ("method=qlora", G32, "method.adapter.rank=4", "activation=int8_tensor"),
        ("method=lsq", "method/adapter=low_rank", "method.adapter.rank=2"),
        ("method=loftq", "weight=nf2", G32, "method.start.residual.rank=4"),
        (
            "method=loftq",
            "weight=nf3",
            G32,
            "method@method.start=gptq",
            "method/residual@method.start.residual=loftq",
            "method.start.residual.rank=4",
            "method.start.residual.rounds=2",
        ),
        (
            "method=lq_lora",
            "weight=nf3",
            "weight.signed_scales=false",
            G32,
            "method.start.residual.rank=4",
            "activation=int8_tensor",
        ),
        ("method=paretoq",),
        ("method=paretoq", "weight.levels=3"),
        ("method=bitnet", "activation=int8_token"),
        ("method=prequant", G32, "weight.bits=2"),
        ("method=ov_freeze", "weight.bits=3"),
        ("method=norm_tweaking", G32, "weight.bits=2"),
        ("method=norm_tweaking", G32, "method@method.start=rtn", "method.end.blocks.targets=float"),
        ("method=qat", "weight=nf3", G32),
    ],
    ids=" ".join,
)
def test_it_reloads_to_the_same_number(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    first = run(tmp_path / "first", *overrides)
    assert first["weight/bits"] > 1 and first["weight/count"] > 0
    reload = ["model=from_run", f"run={tmp_path / 'first'}"]
    again = run(tmp_path / "again", *reload, small=["progress=false"])
    assert again[PPL] == first[PPL]
    left = {path.name for path in (tmp_path / "first").iterdir()}
    assert not any(name.startswith(("training-", "lightning")) for name in left)
