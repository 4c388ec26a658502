"""Codes that move in training (PV-Tuning): none, a share, all of them."""

from dataclasses import replace

import pytest
import torch
from helpers.models import batches, task_of
from helpers.training import METHOD, SMOKE, same, weights
from torch import nn

from qexp.common.errors import FieldError
from qexp.grid import IntGrid, LevelGrid
from qexp.quantizers.fake_quantize import FakeQuantize
from qexp.quantizers.parametrization import attach_weight_quantizer, bake, weight_quantizer
from qexp.quantizers.scale_rules import FixedCodes, MovingCodes, Static
from qexp.solvers.rtn import RTN
from qexp.training.losses import CrossEntropy
from qexp.training.optimizer import AdamW
from qexp.training.trainable import TrainableParameters

GRID = IntGrid(3, group_size=16, scale_dtype="float16")
METHOD = replace(
    METHOD,
    weight=GRID,
    scale=MovingCodes(0.01),
    trained=TrainableParameters(weights=False, norms=False),
    optimizer=AdamW(scales=1e-2, codes=1.0),
)


def test_a_share_of_zero_is_peqa_bit_for_bit():
    made = []
    for scale in (FixedCodes(), MovingCodes(0.0), MovingCodes(0.02)):
        task = task_of()
        replace(METHOD, scale=scale)(task, lambda: batches("llama"))
        made.append(weights(task))
    assert same(made[0], made[1]) and not same(made[0], made[2])


def test_no_more_than_the_share_changes_in_a_step():
    task, trainer = task_of(), replace(SMOKE, steps=1, every=1)
    floats = {name: linear.weight.detach().clone() for name, linear in task.linears().items()}
    method = replace(METHOD, trainer=trainer, optimizer=AdamW(scales=0.0, codes=1.0))
    for made in method(task, lambda: batches("llama")):
        before = RTN(GRID)(floats[made.name], None).packed.codes
        changed = int((made.packed.codes != before).sum())
        assert 0 < changed <= 0.01 * before.numel()
        assert int((made.packed.codes.int() - before).abs().max()) == 1
        assert torch.equal(made.packed.dequantize(), task.model.get_submodule(made.name).weight)


def test_steps_below_half_a_code_change_nothing_unless_they_are_kept():
    for keep, moves in ((0.0, False), (1.0, True)):
        task = task_of()
        floats = {name: linear.weight.detach().clone() for name, linear in task.linears().items()}
        optimizer = AdamW(scales=0.0, codes=0.2, codes_betas=(0.0, 0.0), warmup=0.0, floor=1.0)
        method = replace(METHOD, scale=MovingCodes(0.05, keep), optimizer=optimizer)
        records = method(task, lambda: batches("llama"))
        starts = (RTN(GRID)(floats[made.name], None).packed.codes for made in records)
        pairs = zip(records, starts, strict=True)
        assert any(not torch.equal(made.packed.codes, start) for made, start in pairs) == moves


@pytest.mark.parametrize("rate", [0.05, 0.3])
def test_all_codes_with_their_residuals_are_straight_through_training(rate: float):
    """On a grid whose ends no weight reaches, with one scale, so that steps differ by a factor."""
    grid = IntGrid(8, symmetric=True, per_tensor=True)
    generator = torch.Generator().manual_seed(0)
    weight, x, goal = (torch.randn(12, 16, generator=generator) for _ in range(3))
    weight[0, 0] = -9.0
    made = []
    for rule, kind in ((MovingCodes(1.0, 1.0), "codes"), (Static(), "weights")):
        linear = nn.Linear(16, 12, bias=False)
        linear.weight.data = weight.clone()
        attach_weight_quantizer(linear, rule, grid, FakeQuantize())
        quantizer = weight_quantizer(linear)
        scale = float(grid.scales_of(weight).scale[0, 0])
        if kind == "codes":
            # straight-through training has the residual of the weights from the start
            quantizer.codes.data = (weight / scale + 128).clamp(max=255)
            trained, step = quantizer.codes, rate
        else:
            trained, step = linear.parametrizations.weight.original, rate * scale
        optimizer = torch.optim.Adam([trained], step, betas=(0.0, 0.95), eps=1e-12)
        for _ in range(8):
            optimizer.zero_grad()
            ((x @ linear.weight.T) - goal[:, :12]).square().sum().backward()
            optimizer.step()
            quantizer.after_step()
        made.append(bake(linear).codes)
    assert (made[0] == made[1]).double().mean() > 0.97
    start = RTN(grid)(weight, None).packed.codes
    assert (made[0] != start).double().mean() > 0.2


@pytest.mark.parametrize("grid", [GRID, LevelGrid("nf4", group_size=16)], ids=str)
def test_what_is_baked_is_what_trained_and_a_checkpoint_says_where_codes_are(grid):
    linear = nn.Linear(32, 8, bias=False)
    attach_weight_quantizer(linear, MovingCodes(0.5, 0.5), grid, FakeQuantize())
    quantizer = weight_quantizer(linear)
    quantizer.codes.data += torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    quantizer.after_step()
    saved = {name: tensor.detach().clone() for name, tensor in quantizer.named_parameters()}
    live = linear.weight.detach().clone()
    other = nn.Linear(32, 8, bias=False)
    attach_weight_quantizer(other, MovingCodes(0.5, 0.5), grid, FakeQuantize())
    weight_quantizer(other).load_state_dict(saved, strict=False)
    assert torch.equal(other.weight, live)
    for each in (linear, other):
        assert torch.equal(bake(each).dequantize(), live)
    assert int(quantizer.inner.codes.max()) <= grid.top


def test_a_killed_run_goes_on_with_the_same_codes(tmp_path, monkeypatch):
    method = replace(METHOD, scale=MovingCodes(0.02, 0.5))
    whole, killed = task_of(), task_of(folder=tmp_path)
    method(whole, lambda: batches("llama"))
    plain, calls = CrossEntropy.__call__, []

    def dying(self, *rest):
        calls.append(1)
        if len(calls) > 5:
            raise KeyError("killed")
        return plain(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(CrossEntropy, "__call__", dying)
        with pytest.raises(KeyError, match="killed"):
            method(killed, lambda: batches("llama"))
    assert list(tmp_path.glob("training-*/last.ckpt"))
    again = task_of(folder=tmp_path)
    method(again, lambda: batches("llama"))
    assert same(weights(again), weights(whole))


def test_settings_that_cannot_be_are_refused():
    for wrong in ({"share": 1.5}, {"keep": -0.1}):
        with pytest.raises(FieldError, match="give a number from 0 to 1"):
            MovingCodes(**wrong)
    with pytest.raises(FieldError, match=r"trainer\.strategy=fsdp"):
        replace(METHOD, trainer=replace(SMOKE, strategy="fsdp"))
    with pytest.raises(FieldError, match="codes_betas"):
        AdamW(codes_betas=(1.0, 0.9))
