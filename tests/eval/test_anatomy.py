"""Statistics of tensors, matrices and norms against their definitions."""

import math

import pytest
import torch
from helpers.models import FAMILIES, task_of

from qexp.eval.anatomy import Tally, flatness, gains
from qexp.transforms.rotate import Rotate, rotation


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def statistics(x: torch.Tensor, parts: int = 1) -> dict[str, float]:
    tally = Tally()
    for part in x.chunk(parts):
        tally.add(part)
    return tally.statistics()


def test_a_normal_distribution():
    found = statistics(normal(2000, 50))
    assert found["kurtosis"] == pytest.approx(3, abs=0.1)
    assert found["reach"] == pytest.approx(math.sqrt(2 * math.log(1e5)) / 0.6745, rel=0.1)
    assert found["top_channel"] == pytest.approx(1 / 50, rel=0.1)


def test_parts_are_the_whole_and_no_statistic_depends_on_the_unit():
    x = normal(60, 16) + 3
    whole = statistics(x)
    assert statistics(x, 7) == pytest.approx(whole, rel=1e-3)
    assert statistics(64 * x) == pytest.approx(whole, rel=1e-3)


def test_by_hand():
    x = normal(40, 16)
    x[:, 5] *= 30
    found = statistics(x)
    exact = x.double()
    centred = exact - exact.mean()
    assert found["kurtosis"] == pytest.approx(float((centred**4).mean() / (centred**2).mean() ** 2))
    assert found["top_channel"] == pytest.approx(
        float(exact[:, 5].square().sum() / exact.square().sum())
    )
    assert found["reach"] == pytest.approx(float(x.abs().max() / x.abs().median()), rel=0.02)
    step = x.abs().amax(1, keepdim=True) / 127
    error = ((x / step).round() * step - x).norm() / x.norm()
    assert found["error8"] == pytest.approx(float(error), rel=1e-4)


def test_flatness_is_of_singular_values():
    w = normal(12, 20)
    expected = torch.linalg.matrix_norm(w, 2) / w.norm() * math.sqrt(12)
    assert flatness(w) == flatness(w.T) == pytest.approx(float(expected), rel=1e-5)
    q = rotation(20, "random", torch.Generator().manual_seed(0))
    assert flatness(w @ q.float()) == pytest.approx(flatness(w), rel=1e-5)
    assert flatness(torch.eye(7)) == pytest.approx(1) and flatness(5 * w) == pytest.approx(
        flatness(w)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_gains_of_norms(family):
    task = task_of(family)
    found = gains(task)
    arch = task.arch
    assert len(found) == len(task.blocks) * len(arch.norms) + (arch.norm is not None)
    with torch.no_grad():
        weight = task.blocks[1].get_submodule(arch.norms[0]).weight
        weight[::2] += 0.5
    name = f"{arch.blocks}.1.{arch.norms[0]}"
    assert gains(task)[name] == pytest.approx(float(weight.detach().double().std(correction=0)))
    assert gains(task)[name] > found[name]


def test_folded_norms_have_no_gains_left():
    task = task_of("llama")
    Rotate()(task, list)
    assert max(gains(task).values()) == 0
