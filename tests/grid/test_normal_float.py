"""NormalFloat of 2, 3 and 4 bits: levels, a scale for each sign, scales quantized in turn."""

from pathlib import Path

import pytest
import torch
from helpers.models import data_dir
from helpers.problems import problem
from safetensors.torch import load_file
from torch import Tensor

from qexp.common.errors import FieldError, UserError
from qexp.grid import IntGrid, LevelGrid
from qexp.grid.float_formats import levels
from qexp.packed.coded import Coded
from qexp.quantizers.fake_quantize import FakeQuantize
from qexp.quantizers.scale_rules import LSQ, Dynamic, check_scale_rule
from qexp.solvers import RTN

GOLDEN = (data_dir() or Path(".")).parent / "golden"
SECOND = IntGrid(8, include_zero=False, real_zero=True, scale_dtype="float16")
SIGNED = LevelGrid("nf3", group_size=32, scale_dtype="float16", signed_scales=True)


@pytest.mark.parametrize(
    ("kind", "tail", "published"),
    [
        # BitDistiller's table of 3 bits
        ("nf3", "own", [-1, -0.5350, -0.2469, 0, 0.1833, 0.3820, 0.6230, 1]),
        # LoftQ and LQ-LoRA: the outermost quantile of 4 bits
        ("nf3", "nf4", [-1, -0.4786, -0.2171, 0, 0.1609, 0.3379, 0.5626, 1]),
        ("nf2", "nf4", [-1, 0, 0.3379, 1]),
    ],
)
def test_levels_are_the_published_ones(kind: str, tail: str, published: list[float]) -> None:
    assert [round(value, 4) for value in levels(kind, tail)] == published
    assert levels("nf4", "own") == levels("nf4", "nf4")


@pytest.mark.parametrize("kind", ["nf2", "nf3", "nf4"])
def test_codes_fill_their_bits(kind: str) -> None:
    weight, _ = problem()
    grid = LevelGrid(kind, group_size=32, scale_dtype="float16")
    solution = RTN(grid)(weight)
    assert solution.bits == int(kind[2]) + 16 / 32 == grid.cost(*weight.shape)
    assert len(solution.packed.codes.unique()) == 2 ** int(kind[2])


def by_hand(weight: Tensor) -> Tensor:
    """BitDistiller's rule: the nearest level of w / max for w ≥ 0 and of w / |min| else."""
    groups = weight.reshape(-1, 32)
    high, low = groups.amax(1, keepdim=True), -groups.amin(1, keepdim=True)
    scale = torch.where(groups < 0, low, high).half().float()
    table = torch.tensor(levels("nf3"))
    nearest = (groups[..., None] / scale[..., None] - table).abs().argmin(-1)
    return (table[nearest] * scale).reshape(weight.shape)


def test_each_sign_has_its_scale() -> None:
    weight, _ = problem()
    weight = weight + 0.3
    solution = RTN(SIGNED)(weight)
    torch.testing.assert_close(solution.weight, by_hand(weight))
    one = RTN(LevelGrid("nf3", group_size=32, scale_dtype="float16"))(weight).weight
    assert (solution.weight - weight).square().sum() < (one - weight).square().sum()
    assert solution.bits == 3 + 32 / 32
    restored = Coded.restore(solution.packed.stored(), solution.packed.layout())
    assert torch.equal(restored.dequantize(), solution.weight)
    assert LevelGrid("nf3", group_size=128, signed_scales=True, scale_dtype="float16").cost(
        128, 256
    ) == pytest.approx(3.25)  # BitDistiller prints 3


def test_rows_of_one_sign_survive() -> None:
    x = torch.tensor([[1.0, 2.0, 4.0], [-1.0, -2.0, -4.0], [0.0, 0.0, 0.0]])
    made = LevelGrid("nf3", signed_scales=True)(x)
    assert made.isfinite().all() and made[:, -1].tolist() == [4.0, -4.0, 0.0]


def test_training_passes_every_gradient_of_its_own_range() -> None:
    weight, _ = problem()
    made = Dynamic()(weight, SIGNED, FakeQuantize())
    leaf = weight.clone().requires_grad_()
    rounded = made(leaf)
    torch.testing.assert_close(rounded, by_hand(weight))
    rounded.sum().backward()
    # scales in half precision may leave the very ends outside
    assert float((leaf.grad == 1).float().mean()) > 0.95
    with pytest.raises(FieldError, match=r"^scale: two scales of a group do not train"):
        check_scale_rule(LSQ(), SIGNED)


@pytest.mark.parametrize("rows", [192, 576])
def test_double_quantization_takes_4_127_bits(rows: int) -> None:
    weight = torch.randn(rows, 256, generator=torch.Generator().manual_seed(0))
    grid = LevelGrid("nf4", group_size=64, scale_dtype="float16", scales=SECOND)
    solution = RTN(grid)(weight)
    assert solution.bits == pytest.approx(4 + 8 / 64 + 32 / (64 * rows))
    assert solution.bits == pytest.approx(4.127, abs=2e-3)
    restored = Coded.restore(solution.packed.stored(), solution.packed.layout())
    assert torch.equal(restored.dequantize(), solution.weight)
    plain = RTN(LevelGrid("nf4", group_size=64, scale_dtype="float16"))(weight).weight
    ratio = (solution.weight - weight).norm() / (plain - weight).norm()
    assert float(ratio) == pytest.approx(1, abs=5e-3)


@pytest.mark.parametrize("wrong", [{"per_tensor": True}, {"signed_scales": True}], ids=str)
def test_what_does_not_go_together_is_refused(wrong: dict[str, bool]) -> None:
    with pytest.raises(UserError, match=r"^weight\.scales needs "):
        LevelGrid("nf4", scales=SECOND, **wrong)
    with pytest.raises(UserError, match=r"tail=nf2 is unknown: give own or nf4"):
        LevelGrid("nf3", tail="nf2")


@pytest.mark.skipif(
    not (GOLDEN / "bitsandbytes.safetensors").exists(), reason="no golden outputs on this machine"
)
def test_nf4_is_bitsandbytes_s() -> None:
    weight = load_file(GOLDEN / "attention_q.safetensors")["weight"].float()
    golden = load_file(GOLDEN / "bitsandbytes.safetensors")
    coded = RTN(LevelGrid("nf4", group_size=64))(weight).packed
    pairs = coded.codes.reshape(-1, 2)
    packed = (pairs[:, 0] * 16 + pairs[:, 1]).to(torch.uint8)
    assert torch.equal(packed, golden["bnb.nf4.b64.packed"].flatten())
    torch.testing.assert_close(coded.scale.flatten(), golden["bnb.nf4.b64.absmax"].flatten())
    double = RTN(LevelGrid("nf4", group_size=64, scales=SECOND))(weight).weight
    theirs = golden["bnb.nf4.b64.double"].float()
    # both store 8 bits of a scale: theirs on an uneven grid for 256 of them
    ratio = (double - weight).norm() / (theirs - weight).norm()
    assert float(ratio) == pytest.approx(1, abs=2e-3)
