"""PACT's penalty: the squares of the clipping levels that train, and what it does to them."""

from dataclasses import replace

import pytest
import torch
from helpers.models import batches, task_of
from helpers.training import METHOD, STATIC
from hydra import compose

from qexp.common.errors import FieldError
from qexp.config.instantiate import instantiate
from qexp.grid import IntGrid
from qexp.quantizers.activation import FakeQuant
from qexp.quantizers.fake_quantize import FakeQuantize
from qexp.quantizers.placement import LinearInputs
from qexp.quantizers.scheme import QuantizedActivations, quantize_activations
from qexp.task import Task
from qexp.training.clipping_levels import ClippingLevels

pytestmark = pytest.mark.usefixtures("configured")


def quantized(dynamic: bool = False) -> Task:
    task = task_of()
    kind = QuantizedActivations(LinearInputs(), IntGrid(6, per_tensor=not dynamic), dynamic)
    quantize_activations(task, [kind], lambda: batches("llama"))
    for quantizer in task.quantizers.values():
        assert isinstance(quantizer, FakeQuant)
        quantizer.make_trainable(FakeQuantize(), offset=False)
    return task


def test_it_is_the_sum_of_squares_by_hand() -> None:
    task = quantized()
    with ClippingLevels(0.5).watch(task) as watch:
        value = watch.take(torch.zeros(()))
        with torch.no_grad():
            assert watch.take(torch.zeros(())) == 0  # validation
    expected, slopes = 0.0, []
    for q in task.quantizers.values():
        steps = max(float(q.zero), 63 - float(q.zero))  # codes on the longer side of zero
        scale = float(q.scale.detach())
        expected += 0.5 * (steps * scale) ** 2
        slopes.append(2 * 0.5 * steps**2 * scale)
    assert len(slopes) == 12 and float(value.detach()) == pytest.approx(expected, rel=1e-5)
    value.backward()
    found = [float(q.scale.grad) for q in task.quantizers.values()]
    assert found == pytest.approx(slopes, rel=1e-4)


def test_ranges_of_each_tensor_have_no_level() -> None:
    with ClippingLevels().watch(quantized(dynamic=True)) as watch:
        assert watch.take(torch.zeros(())) == 0


def test_levels_end_lower_with_it() -> None:
    ends = []
    for weight in (0.0, 10.0):
        task = task_of()
        step = replace(METHOD, penalty=ClippingLevels(weight), activations=[STATIC])
        step(task, lambda: batches("llama"))
        ends.append(sum(float(q.scale) for q in task.quantizers.values()))
    assert ends[1] < ends[0]


def test_pact_has_it_and_lsq_has_not() -> None:
    overrides = ["data=synthetic", "calibration=synthetic", "activation=int8_tensor"]
    pact = instantiate(compose("config", ["method=pact", *overrides]).method)
    assert pact.penalty == ClippingLevels()
    assert instantiate(compose("config", ["method=lsq", *overrides]).method).penalty != pact.penalty
    with pytest.raises(FieldError, match="weight=-1"):
        ClippingLevels(-1)
