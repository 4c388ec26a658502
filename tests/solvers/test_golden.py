"""Parity with the reference implementations on a real layer (golden/README.md says how made)."""

from math import inf
from pathlib import Path

import pytest
import torch
from helpers.models import data_dir
from helpers.problems import loss
from safetensors.torch import load_file
from torch import Tensor

from qexp.grid import IntGrid
from qexp.packed.coded import Coded
from qexp.solvers import GPTQ, BiLLM, Solver, SpQR

FOLDER = data_dir()
FILE = (FOLDER or Path(".")).parent / "golden" / "attention_q.safetensors"
pytestmark = pytest.mark.skipif(not FILE.exists(), reason="no golden outputs on this machine")


def two_levels(bits: int, size: int, second: bool = True) -> IntGrid:
    level = IntGrid(3, group_size=16, include_zero=False, real_zero=True) if second else None
    return IntGrid(
        bits, group_size=size, include_zero=False, real_zero=True, scales=level, zeros=level
    )


SOLVERS: dict[str, Solver] = {
    "gptq.w4.asym": GPTQ(IntGrid(4)),
    "gptq.w3.sym": GPTQ(IntGrid(3, symmetric=True)),
    "gptq.w3.g64": GPTQ(IntGrid(3, group_size=64)),
    "gptq.w2.g64.act": GPTQ(IntGrid(2, group_size=64), act_order=True, static_groups=True),
    "gptq.w4.act": GPTQ(IntGrid(4), act_order=True),
    "spqr.w4.g16": SpQR(two_levels(4, 16), threshold=0.2, damp=1.0),
    "spqr.w2.g64": SpQR(two_levels(2, 64), threshold=2.0, act_order=True),
    "spqr.w3.g32.noout": SpQR(two_levels(3, 32, second=False), threshold=inf),
    "billm": BiLLM(),
}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(FILE)


@pytest.mark.parametrize("key", SOLVERS)
def test_parity(golden: dict[str, Tensor], key: str) -> None:
    weight, hessian, reference = golden["weight"], golden["hessian"], golden[key]
    solution = SOLVERS[key](weight, hessian)
    ours, theirs = (loss(w - weight, hessian) for w in (solution.weight, reference))
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert (solution.weight - reference).abs().lt(1e-5).double().mean() >= 0.99
    nearest = SOLVERS[key].baseline(weight, hessian).weight
    assert ours < loss(nearest - weight, hessian)


@pytest.mark.parametrize("key", [key for key in SOLVERS if key.startswith("spqr")])
def test_outliers_are_those_of_the_reference(golden: dict[str, Tensor], key: str) -> None:
    packed = SOLVERS[key](golden["weight"], golden["hessian"]).packed
    assert isinstance(packed, Coded)
    found = torch.zeros_like(golden["weight"])
    if packed.outliers is not None:
        found = packed.outliers.put(found)
    reference = golden[f"{key}.outliers"].bool()
    assert int((found.ne(0) != reference).sum()) <= 0.02 * int(reference.sum())
