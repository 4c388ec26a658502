"""Integer-arithmetic-only QAT: codes, integer products, whole runs."""

import pytest
import torch
from helpers.pipeline import PPL, run
from hydra import compose

from qexp.config.instantiate import instantiate
from qexp.grid import IntGrid
from qexp.packed import weights_file
from qexp.packed.coded import Coded

pytestmark = pytest.mark.usefixtures("configured", "own_cache")
WEIGHT = IntGrid(8, symmetric=True, narrow=True, per_tensor=True)
INPUT = IntGrid(8, per_tensor=True)


def test_integer_products_are_those_of_fake_quantization():
    """r = S (q - Z), products of codes in int32; zero is a code."""
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(12, 40, generator=generator), torch.randn(9, 40, generator=generator) + 0.7
    a, b = WEIGHT.fit(w), INPUT.fit(x)
    codes = [(grid.encode(t, q) - q.zero).int() for grid, t, q in ((WEIGHT, w, a), (INPUT, x, b))]
    assert int(codes[0].abs().max()) == 127
    product = (codes[1].long() @ codes[0].long().T).int()
    expected = INPUT.round(x, b) @ WEIGHT.round(w, a).T
    torch.testing.assert_close(product * (a.scale * b.scale), expected, rtol=1e-5, atol=1e-5)
    zero = torch.zeros(1, 1)
    assert float(INPUT.round(zero, b)) == float(WEIGHT.round(zero, a)) == 0
    assert float(b.zero) == float(b.zero.round())


def test_a_run_and_its_codes(tmp_path):
    small = ("model=tiny_llama", "eval=held_out", "weight.group_size=null", "trainer=smoke")
    first = run(tmp_path / "first", *small, "method=jacob")
    assert 8 < first["weight/bits"] < 8.1 and first[PPL] > 1
    packed, others = weights_file.load(tmp_path / "first")
    for form in packed.values():
        assert isinstance(form, Coded) and int(form.codes.min()) >= 1  # 0 is the lowest
    assert any(name.startswith("quantizers.") for name in others)
    again = run(tmp_path / "again", "model=from_run", f"run={tmp_path / 'first'}", small=[])
    assert again[PPL] == first[PPL]
    late = run(tmp_path / "late", *small, "method=jacob", "method.schedule.activation_start=1.0")
    assert late[PPL] != first[PPL]


def test_it_composes_with_any_activation(tmp_path):
    cfg = compose("config", ["method=jacob"])
    assert cfg.activation.placement._target_.endswith("AllOps")
    assert cfg.activation.grid.range.momentum == 0.99
    for words in (["activation=none"], ["activation=int8_token"], ["kv=int8_token"]):
        assert instantiate(compose("config", ["method=jacob", *words]).method)
    small = ("model=tiny_llama", "eval=held_out", "weight.group_size=null", "trainer=smoke")
    assert run(tmp_path, *small, "method=jacob", "activation=none")[PPL] > 1


@pytest.mark.parametrize(
    "words",
    [
        ("method/rounding=parq", "weight.bits=2"),
        ("method/rounding=relax", "weight.bits=2"),
        ("method/rounding=stochastic",),
        ("method/scale=static", "+method/schedule=stochastic"),
        ("method/scale=static", "+method/schedule=nearest"),
        ("+method.optimizer.sam=0.05",),
    ],
    ids=str,
)
def test_fields_of_training_compose_and_run(tmp_path, words):
    small = (
        "model=tiny_llama",
        "eval=held_out",
        "trainer=smoke",
        "trainer.steps=2",
        "trainer.every=2",
    )
    run(tmp_path, *small, "method=qat", *words)
    lines = (tmp_path / "training.csv").read_text().splitlines()
    assert len(lines) == 2


def test_outlier_suppression_s_parts_compose():
    words = ("transform=gamma", "activation=int8_tensor", "activation/grid/range=token_quantile")
    cfg = compose("config", list(words))
    assert instantiate(cfg.transform).kind == "identity"
    assert instantiate(cfg.activation).grid.range.share == 0.99
