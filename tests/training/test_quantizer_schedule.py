"""Schedules in training: delays, running ranges, weights that stay on the grid, SAM."""

from dataclasses import replace

import pytest
import torch
from helpers.models import batches, task_of
from helpers.training import GRID, METHOD, SMOKE, same, weights

from qexp.common.errors import FieldError, UserError
from qexp.grid import IntGrid
from qexp.grid.ranges import MovingAverage
from qexp.packed.coded import Coded
from qexp.quantizers.annealed import PARQ, stochastic
from qexp.quantizers.placement import LinearInputs
from qexp.quantizers.scale_rules import Static
from qexp.quantizers.scheme import QuantizedActivations
from qexp.training import losses
from qexp.training.optimizer import AdamW, _SharpnessAware
from qexp.training.quantizer_schedule import QuantizerSchedule

STATIC = replace(METHOD, scale=Static())


def inputs(momentum: float) -> QuantizedActivations:
    grid = IntGrid(8, per_tensor=True, range=MovingAverage(momentum))
    return QuantizedActivations(LinearInputs(), grid)


def trained(method, folder=None, family="llama"):
    task = task_of(family, folder)
    torch.manual_seed(0)
    records = method(task, lambda: batches(family))
    return task, records


def test_a_delay_as_long_as_training_is_weight_only():
    late = replace(
        METHOD, activations=[inputs(0.9)], schedule=QuantizerSchedule(activation_start=1.0)
    )
    frozen = replace(late, trained=replace(late.trained, ranges=False))
    one, two = trained(frozen)[0], trained(METHOD)[0]
    assert same(weights(one.model), weights(two.model))
    assert all(q.enabled for q in one.quantizers.values())


def test_running_ranges_without_memory_are_those_of_the_last_batch():
    schedule = QuantizerSchedule(activation_start=1.0, running_ranges=True)
    method = replace(METHOD, activations=[inputs(0.0)], schedule=schedule)
    seen = {}
    task = task_of()
    handle = task.blocks[1].mlp.down_proj.register_forward_pre_hook(
        lambda module, args: seen.update(x=args[0].detach()) if module.training else None
    )
    torch.manual_seed(0)
    method(task, lambda: batches("llama"))
    handle.remove()
    q = task.quantizers["model/layers/1/mlp/down_proj/input"]
    expected = q.grid.fit(seen["x"].reshape(1, -1))
    torch.testing.assert_close(q.scale, expected.scale)
    assert q.running is None and q.enabled


def test_a_killed_run_resumes_its_running_ranges(tmp_path, monkeypatch):
    schedule = QuantizerSchedule(activation_start=0.5, running_ranges=True)
    method = replace(METHOD, activations=[inputs(0.9)], schedule=schedule)
    whole, _ = trained(method, tmp_path / "whole")
    plain, calls = losses.CrossEntropy.__call__, []

    def dying(self, task, *rest):
        calls.extend([1] if task.training else [])
        if len(calls) == 5:
            raise KeyError("killed")
        return plain(self, task, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(losses.CrossEntropy, "__call__", dying)
        with pytest.raises(KeyError, match="killed"):
            trained(method, tmp_path / "killed")
    assert same(weights(trained(method, tmp_path / "killed")[0]), weights(whole))


def test_rounding_to_nearest_stalls_and_stochastic_rounding_moves():
    """R with steps below half a code changes nothing; SR and latent weights do."""
    rate = AdamW(weights=1e-3, clip=None, warmup=0.0)
    method = replace(
        STATIC, optimizer=rate, trained=replace(STATIC.trained, norms=False, embeddings=False)
    )
    codes = {}
    for update in ("latent", "nearest", "stochastic"):
        _, records = trained(replace(method, schedule=QuantizerSchedule(update=update)))
        codes[update] = [r.packed.codes for r in records if isinstance(r.packed, Coded)]
    start = [
        Coded.of(GRID, linear.weight, GRID.scales_of(linear.weight)).codes
        for linear in task_of().linears().values()
    ]
    moved = {
        u: sum(int((a != b).sum()) for a, b in zip(c, start, strict=True)) for u, c in codes.items()
    }
    assert moved["nearest"] == 0 < moved["latent"] and moved["stochastic"] > 0
    again = trained(replace(method, schedule=QuantizerSchedule(update="stochastic")))[1]
    assert all(
        torch.equal(a.packed.codes, b) for a, b in zip(again, codes["stochastic"], strict=True)
    )


def test_a_quadratic_in_one_dimension():
    """Stochastic rounding keeps an error that smaller steps do not cure; latent weights do not."""
    torch.manual_seed(0)
    errors = {}
    for rate in (0.1, 0.01):
        w = latent = torch.zeros(1024).double()
        squares, behind = [], []
        for step in range(1500):
            w = stochastic(w - rate * (w - 0.3))
            latent = latent - rate * (latent.round() - 0.3)
            if step > 500:
                squares.append(((w - 0.3) ** 2).mean())
                behind.append(latent.round().mean())
        errors[rate] = float(torch.stack(squares).mean())
        assert float(torch.stack(behind).mean()) == pytest.approx(0.3, abs=0.02)
    assert errors[0.01] > 0.8 * errors[0.1] > 0.1


def test_annealed_weights_end_on_the_grid():
    method = replace(STATIC, rounding=PARQ(end=0.5), activation_rounding=METHOD.rounding)
    task, records = trained(method)
    for record in records:
        assert torch.equal(task.linears()[record.name].weight, record.packed.dequantize())


def test_sharpness_aware_minimization_of_radius_zero_is_adamw():
    """The wrapper too, although a radius of zero does not make one."""
    base = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    results = {}
    for radius in (None, 0.0, 0.5):
        p = torch.nn.Parameter(base.detach().clone())
        inner = torch.optim.AdamW([{"params": [p], "lr": 0.1}], fused=True)
        optimizer = inner if radius is None else _SharpnessAware(inner, radius)
        for _ in range(3):

            def closure(p=p, optimizer=optimizer):
                optimizer.zero_grad()
                loss = (p**4).sum()
                loss.backward()
                return loss

            optimizer.step(closure)
        results[radius] = p.detach()
    assert torch.equal(results[None], results[0.0])
    assert not torch.equal(results[None], results[0.5])


def test_a_sharpness_aware_step_by_hand():
    p = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = _SharpnessAware(torch.optim.SGD([p], lr=1.0), 0.5)

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum() / 2
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) == 12.5  # at the parameters
    torch.testing.assert_close(p.detach(), -0.5 * torch.tensor([0.6, 0.8]))


def test_sharpness_aware_training_resumes(tmp_path, monkeypatch):
    method = replace(METHOD, optimizer=AdamW(weights=1e-3, sam=0.05))
    whole, _ = trained(method, tmp_path / "whole")
    plain, calls = losses.CrossEntropy.__call__, []

    def dying(self, task, *rest):
        calls.extend([1] if task.training else [])
        if len(calls) == 9:  # two a step
            raise KeyError("killed")
        return plain(self, task, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(losses.CrossEntropy, "__call__", dying)
        with pytest.raises(KeyError, match="killed"):
            trained(method, tmp_path / "killed")
    assert same(weights(trained(method, tmp_path / "killed")[0]), weights(whole))


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(FieldError, match=r"schedule\.update=nearest: .*method/scale=static"):
        replace(METHOD, schedule=QuantizerSchedule(update="nearest"))
    with pytest.raises(FieldError, match=r"trainer\.devices=1 trainer\.recompute=false"):
        trainer = replace(SMOKE, recompute=True)
        replace(METHOD, schedule=QuantizerSchedule(running_ranges=True), trainer=trainer)
    with pytest.raises(UserError, match="activation/grid/range=moving_average"):
        minmax = QuantizedActivations(LinearInputs(), IntGrid(8, per_tensor=True))
        method = replace(
            METHOD, activations=[minmax], schedule=QuantizerSchedule(running_ranges=True)
        )
        trained(method)
    with pytest.raises(UserError, match=r"method\.optimizer\.sam: .*trainer\.accumulate=1"):
        trained(replace(METHOD, optimizer=AdamW(sam=0.1), trainer=replace(SMOKE, accumulate=2)))
