"""Fixed scales: unchanged functions, less error where channels stand out, every family."""

import pytest
import torch
from helpers.channels import ALL, NORMS, TENSOR, VALUES, close, drift, logits, planted
from helpers.models import FAMILIES, joined, task_of

from qexp.common.errors import UserError
from qexp.grid import IntGrid
from qexp.methods.blockwise import Direct
from qexp.quantizers.scheme import FloatActivations, quantize_activations
from qexp.solvers.rtn import RTN
from qexp.transforms.awq import AWQ
from qexp.transforms.channels import channels_of
from qexp.transforms.clip import clipped
from qexp.transforms.equalize import Equalize, reach
from qexp.transforms.os_plus import OutlierSuppression
from qexp.transforms.site_collection import collect_statistics
from qexp.transforms.site_statistics import ScaleShift
from qexp.transforms.smooth import Smooth
from qexp.walk import walk

GRID = IntGrid(4, group_size=32)
FIXED = [
    Smooth(GRID, TENSOR),
    Smooth(GRID, TENSOR, alpha=[0.25, 0.75], sites=ALL),
    AWQ(GRID, points=4, clip=False),
    Equalize(ALL),
    OutlierSuppression(GRID, TENSOR, points=4, sites=ALL),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("transform", FIXED, ids=lambda t: f"{type(t).__name__}-{t.sites}")
def test_no_logit_changes(family, transform):
    if family == "bert" and transform.sites == NORMS:
        with pytest.raises(UserError, match="is post-norm"):
            transform(task_of(family), lambda: [joined(family)])
        return
    task, batch = task_of(family), joined(family)
    expected = logits(task, batch)
    before = [p.detach().clone() for p in task.parameters()]
    assert transform(task, lambda: [batch]) == []
    close(logits(task, batch), expected, 1e-4)
    assert any(not torch.equal(a, b) for a, b in zip(before, task.parameters(), strict=True))


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "gemma3", "gpt_neox", "vit"])
@pytest.mark.parametrize(
    "transform",
    [Smooth(GRID, TENSOR), Smooth(GRID, TENSOR, alpha=[0.3, 0.5, 0.7, 0.9]),
     OutlierSuppression(GRID, TENSOR, points=12)],
    ids=["smooth", "searched", "os_plus"],
)  # fmt: skip
def test_planted_outliers_cost_less_after(family, transform):
    batch = joined(family)
    expected = logits(planted(family), batch)
    errors = []
    for steps in ([], [transform]):
        task = planted(family)
        for step in [*steps, Direct(RTN(IntGrid(8)), [TENSOR])]:
            step(task, lambda: [batch])
        errors.append(drift(task, batch, expected))
    assert errors[1] < 0.2 * errors[0]


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "gpt_neox", "vit"])
@pytest.mark.parametrize("clip", [False, True])
def test_awq_leaves_less_error_of_rounded_weights(family, clip):
    batch, grid = joined(family), IntGrid(3, group_size=32)
    expected = logits(planted(family, 10), batch)
    errors = []
    for steps in ([], [AWQ(grid, clip=clip)]):
        task = planted(family, 10)
        for step in [*steps, Direct(RTN(grid))]:
            step(task, lambda: [batch])
        errors.append(drift(task, batch, expected))
    assert errors[1] < errors[0]


@pytest.mark.parametrize("grouped", [False, True])
def test_awq_leaves_values_that_heads_share_alone(grouped):
    """The reference scales value → output projection only where the two have the same shape."""
    task, batch = task_of("llama"), joined("llama")
    expected, before = logits(task, batch), task.blocks[0].self_attn.o_proj.weight.clone()
    step = AWQ(GRID, points=6, clip=False, sites=VALUES, grouped_values=grouped)
    step(task, lambda: [batch])
    moved = not torch.equal(task.blocks[0].self_attn.o_proj.weight, before)
    assert moved == grouped
    close(logits(task, batch), expected, 1e-4)


@pytest.mark.parametrize("step", [AWQ(GRID, points=6, clip=False), Equalize(ALL)], ids=str)
def test_channels_behind_a_relu_are_scaled(step):
    task, batch = task_of("opt"), joined("opt")
    expected, before = logits(task, batch), task.blocks[1].fc2.weight.clone()
    step(task, lambda: [batch])
    assert not torch.equal(task.blocks[1].fc2.weight, before)
    close(logits(task, batch), expected, 1e-4)


@pytest.mark.parametrize(
    ("points", "largest", "count", "last"),
    [(None, 3.0, 100, 0.1), (None, 80.0, 160, 0.1), (20, 3.0, 20, 0.1), (1, 3.0, 1, 3.0)],
)
def test_thresholds_reach_down_to_a_tenth(points, largest, count, last):
    found = OutlierSuppression(GRID, TENSOR, points=points).thresholds(largest)
    assert len(found) == count and found[0] == largest
    assert found[-1] == pytest.approx(last) and found == sorted(found, reverse=True)
    assert OutlierSuppression(GRID, TENSOR).thresholds(0.05) == [0.05]


def test_clipping_takes_the_best_share_of_each_group_by_hand():
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(8, 3, bias=False)
    linear.weight.data = torch.randn(3, 8, generator=generator)
    linear.weight.data[0, 1] = 6
    x = torch.randn(50, 8, generator=generator)
    grid = IntGrid(2, group_size=4)
    result = clipped(linear, x.T @ x, grid, "one")
    for row in range(3):
        for part in (slice(0, 4), slice(4, 8)):
            w = linear.weight.data[row : row + 1, part]
            tried = [w.clamp(-(m := w.abs().max() * (1 - k / 20)), m) for k in range(10)]
            errors = [float(((grid(t) - w) @ x[:, part].T).square().sum()) for t in tried]
            best = tried[errors.index(min(errors))]
            torch.testing.assert_close(result[row : row + 1, part], best)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_equalized_sources_reach_as_far_as_the_weights_that_read_them(family):
    task = planted(family)
    Equalize(NORMS)(task, lambda: pytest.fail("no data is asked for"))
    for channels in channels_of(task, 1, NORMS):
        torch.testing.assert_close(reach(channels), channels.weights(), rtol=1e-3, atol=1e-5)


def test_a_searched_alpha_is_the_best_of_those_tried():
    batch, found = joined("llama"), {}
    for alpha in (0.1, 0.5, [0.1, 0.5]):
        task = planted("llama")
        Smooth(GRID, TENSOR, alpha)(task, lambda: [batch])
        found[str(alpha)] = task.blocks[0].input_layernorm.weight.detach().clone()
    either = (found["0.1"], found["0.5"])
    assert any(torch.equal(found["[0.1, 0.5]"], one) for one in either)


@torch.no_grad()
def test_a_change_is_judged_by_what_folding_and_rounding_will_make_of_it():
    """Shifts of 30, as Outlier Suppression+ is for: W z stays float, whatever rounds W."""
    task, batch = task_of("opt"), joined("opt")
    for channels in channels_of(task, 0, NORMS):
        channels.fold(torch.ones(64), -30.0 * (torch.arange(64) % 9 == 0))
    block = next(walk(task, [batch]))
    for watched in collect_statistics(block, channels_of(task, 0, NORMS), replay=True):
        low, high = watched.ends
        change = ScaleShift(((high - low) / 4).clamp(min=1), (low + high) / 2)
        judged = float(watched.errors(change, [0], GRID, TENSOR)[0].sum())
        kept = {name: p.clone() for name, p in block.module.named_parameters()}
        watched.channels.fold(*change)
        rounded = [
            linear.register_forward_pre_hook(lambda _, args: (TENSOR.rounded(args[0]),))
            for linear in watched.channels.linears
        ]
        for linear in watched.channels.linears:
            linear.weight.data = GRID(linear.weight)
        found: list[torch.Tensor] = []
        seen = watched.module.register_forward_hook(
            lambda _, __, y, found=found: found.append(y[0] if isinstance(y, tuple) else y)
        )
        list(block.outputs())
        error = sum(
            float((y - expected).square().sum())
            for y, expected in zip(found, watched.outputs, strict=True)
        )
        assert judged == pytest.approx(error, rel=1e-3) and error > 0
        for handle in (*rounded, seen):
            handle.remove()
        for name, parameter in block.module.named_parameters():
            parameter.data = kept[name]


def test_scales_do_nothing_to_a_model_on_no_grid():
    task, batch = planted("opt"), joined("opt")
    expected = logits(task, batch)
    Smooth(GRID, FloatActivations())(task, lambda: [batch])
    quantize_activations(task, [FloatActivations()], lambda: pytest.fail("nothing to calibrate"))
    close(logits(task, batch), expected, 1e-4)
