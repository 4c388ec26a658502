"""Progressive rounding: its start, what stays decided, factors of scales, whole runs."""

import pytest
import torch
from helpers.pipeline import PPL, run

from qexp.common.errors import FieldError
from qexp.grid import IntGrid
from qexp.packed import weights_file
from qexp.quantizers.fake_quantize import FakeQuantize
from qexp.quantizers.rounding_rules import AdaRound, ProgressiveRounding
from qexp.quantizers.rounding_variable import Soft, share_up

GRIDS = [
    IntGrid(2, group_size=16, scale_dtype="float16"),
    IntGrid(3, symmetric=True, per_tensor=True),
]


def weight() -> torch.Tensor:
    return torch.randn(8, 32, generator=torch.Generator().manual_seed(0))


def made(grid=GRIDS[0], shares=(0.5, 0.25), factor=True) -> Soft:
    found = ProgressiveRounding(shares, factor)(weight(), grid, FakeQuantize())
    assert isinstance(found, Soft)
    return found


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_it_starts_at_the_weight_and_at_round_to_nearest(grid):
    soft, plain = made(grid), AdaRound()(weight(), grid, FakeQuantize())
    assert torch.equal(soft(weight()), plain(weight()))
    q = soft.scales(weight()).map(lambda part: part.reshape(-1, 1))
    clipped = grid.clip(weight().reshape(len(q.scale), -1), q).reshape(8, 32)
    torch.testing.assert_close(soft(weight()), clipped)
    assert torch.equal(soft.eval()(weight()), grid(weight()))
    assert torch.equal(soft.coded(weight()).dequantize(), grid(weight()))


def test_a_share_of_nothing_decides_all():
    soft = made(shares=(0,))
    soft.before_step(0, 10)
    assert torch.equal(soft(weight()), GRIDS[0](weight()))


def test_what_is_decided_stays_and_is_what_was_most_decided():
    soft = made()
    parameters = [p for p in soft.parameters() if p.requires_grad]
    assert len(parameters) == 2
    optimizer = torch.optim.AdamW(parameters, lr=0.3)
    fixed = torch.zeros(8, 32, dtype=torch.bool)
    for step in range(10):
        before = (share_up(soft.rounding) - 0.5).abs().detach()
        soft.before_step(step, 10)
        now = soft.rounding.isinf()
        assert bool((fixed <= now).all())
        if step in (0, 5):
            assert int(now.sum()) == 8 * 32 - int((0.5, 0.25)[step // 5] * 8 * 32)
            assert before[now].min() >= before[~now].max()
        codes = soft.coded(weight()).codes.clone()
        optimizer.zero_grad()
        (soft(weight()).sum() + soft(weight()).square().sum()).backward()
        assert all(p.grad.isfinite().all() for p in parameters)
        optimizer.step()
        assert torch.equal(soft.coded(weight()).codes[now], codes[now])
        fixed = now
    codes = soft.coded(weight()).codes
    assert codes.min() >= 0 and codes.max() <= GRIDS[0].top
    assert not torch.equal(codes, made().coded(weight()).codes)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_factor_multiplies_scales_and_not_codes(grid):
    soft, plain = made(grid), made(grid)
    with torch.no_grad():
        soft.factor += torch.logit(torch.tensor(0.4))
    assert torch.equal(soft.coded(weight()).codes, plain.coded(weight()).codes)
    stored = soft.coded(weight())
    expected = 0.8 * plain.coded(weight()).dequantize()
    torch.testing.assert_close(stored.dequantize(), expected, rtol=2e-3, atol=0)
    assert torch.equal(stored.dequantize(), soft.eval()(weight()))
    assert stored.bits() == plain.coded(weight()).bits()
    assert made(factor=False).factor is None


def test_shares_that_rise_are_refused():
    for shares in ((0.1, 0.2), (), (2.0,)):
        with pytest.raises(FieldError, match="give numbers from 1 to 0 that do not rise"):
            ProgressiveRounding(shares)


@pytest.mark.usefixtures("configured", "own_cache")
def test_runs_from_no_step_to_reload(tmp_path):
    small = ("model=tiny_llama", "eval=held_out", "weight.bits=2", "calibration=synthetic")
    start = run(tmp_path / "awq", *small, "transform=awq", "method=rtn")
    none = run(tmp_path / "none", *small, "method=tesseraq", "method.blocks.steps=0")
    assert none[PPL] == start[PPL] and none["weight/bits"] == start["weight/bits"]
    first = run(
        tmp_path / "first",
        *small,
        "method=tesseraq",
        "method.blocks.steps=20",
        "method.blocks.optimizer.rounding=5e-2",
    )
    assert first[PPL] != start[PPL] and first["weight/bits"] == start["weight/bits"]
    assert (tmp_path / "first" / weights_file.FILE).exists()
    again = run(tmp_path / "again", "model=from_run", f"run={tmp_path / 'first'}", small=[])
    assert again[PPL] == first[PPL]
