"""Parity with the reference code of OBQ and MagR on a real layer (golden/README.md)."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.models import data_dir
from helpers.problems import loss
from safetensors.torch import load_file
from torch import Tensor

from qexp.grid import IntGrid
from qexp.grid.ranges import MSE, MinMax
from qexp.packed.coded import Coded
from qexp.solvers import GPTQ, OBQ
from qexp.solvers.factor import damped, inverse_factor
from qexp.solvers.refine import descended
from qexp.solvers.sweep import sweep
from qexp.transforms.magr import reduce_magnitude

FOLDER = (data_dir() or Path(".")).parent / "golden"
pytestmark = pytest.mark.skipif(
    not (FOLDER / "magr.safetensors").exists(), reason="no golden outputs on this machine"
)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    names = ("attention_q", "obq", "magr")
    return {
        key: value
        for name in names
        for key, value in load_file(FOLDER / f"{name}.safetensors").items()
    }


ROWS = 6  # each is solved alone
SYMMETRIC = IntGrid(3, symmetric=True, range=MSE())
OBQS = {
    "w3": (OBQ(SYMMETRIC, 0.01), 0.99, 1e-3),
    "w3.damp0": (OBQ(SYMMETRIC), 0.98, 5e-3),
    "w4": (OBQ(replace(SYMMETRIC, bits=4), 0.01), 0.99, 1e-3),
    "w3.asym": (OBQ(IntGrid(3), 0.01), 0.99, 1e-3),
}


@pytest.mark.parametrize("key", OBQS)
def test_parity_of_obq(golden: dict[str, Tensor], key: str) -> None:
    solver, share, near = OBQS[key]
    weight, hessian = golden["weight"][:ROWS], golden["hessian"]
    reference = golden[f"obq.{key}"][:ROWS]
    ours = solver(weight, hessian).weight
    errors = [loss(each - weight, hessian) for each in (ours, reference)]
    assert errors[0] == pytest.approx(errors[1], rel=near)
    assert (ours - reference).abs().lt(1e-5).double().mean() >= share


def test_parity_of_magr(golden: dict[str, Tensor]) -> None:
    weight, hessian = golden["weight"], golden["hessian"]
    for key, alpha, groups in (("row", 1e-3, 1), ("g64", 1e-4, 9)):
        ours = reduce_magnitude(weight, hessian, alpha, 200, groups)
        torch.testing.assert_close(ours, golden[f"magr.{key}"], rtol=0, atol=1e-4)


class Lower(MinMax):
    """The lower end and 0.9 of the width: the reference shrinks the scale, and finds the zero point
    from the whole minimum."""

    def __call__(self, x, grid, counts=None):
        low, high = super().__call__(x, grid, counts)
        return low, low + 0.9 * (high - low)


SHRUNK = GPTQ(IntGrid(3, range=Lower()))


def test_parity_of_gptq_on_what_magr_left(golden: dict[str, Tensor]) -> None:
    weight, hessian = golden["weight"], golden["hessian"]
    pairs = {"optq.w3": ("row", SHRUNK), "optq.w2.g64": ("g64", GPTQ(IntGrid(2, group_size=64)))}
    for key, (start, solver) in pairs.items():
        ours = solver(golden[f"magr.{start}"], hessian).weight
        errors = [loss(each - weight, hessian) for each in (ours, golden[f"magr.{key}"])]
        assert errors[0] == pytest.approx(errors[1], rel=5e-3)


@pytest.mark.parametrize("key", ["magr.optq.w3.cd1", "optq.w3.cd1"])
def test_parity_of_its_coordinate_pass(golden: dict[str, Tensor], key: str) -> None:
    """From the first column to the last, in a heavily damped H, near the weights before MagR or,
    without it, near what GPTQ made of them as each block of 128 began."""
    weight, hessian = golden["weight"], golden["hessian"]
    packed, near = SHRUNK(golden["magr.row"], hessian).packed, weight
    if not key.startswith("magr"):
        packed, near = SHRUNK(weight, hessian).packed, as_blocks_began(weight, hessian)
    assert isinstance(packed, Coded)
    mirrored = replace(packed, codes=packed.codes.flip(1))
    metric = damped(hessian, 0.75).flip(0, 1)
    ours = descended(mirrored, near.flip(1), metric, False).dequantize().flip(1)
    errors = [loss(each - weight, hessian) for each in (ours, golden[key])]
    assert errors[0] == pytest.approx(errors[1], rel=5e-3)
    assert (ours - golden[key]).abs().lt(1e-5).double().mean() >= 0.99


def as_blocks_began(weight: Tensor, hessian: Tensor) -> Tensor:
    grid, seen = SHRUNK.grid, []
    q = grid.fit(weight).map(lambda part: part[:, 0])

    def fit(values: Tensor, _: int) -> tuple[Tensor, ...]:
        seen.append(values.clone())
        return ()

    upper = inverse_factor(hessian, SHRUNK.damp).upper
    sweep(weight, upper, fit, lambda w: grid.round(w, q), 64, fit_every=128)
    return torch.cat(seen, 1)
