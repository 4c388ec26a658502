"""Channel scales: the function of every family is unchanged, folded or live."""

import copy
from contextlib import ExitStack

import pytest
import torch
from helpers.channels import ALL, NORMS, close, every, logits, random_scale
from helpers.models import FAMILIES, joined, task_of

from qexp.common.errors import UserError
from qexp.transforms.channels import channels_of

CASES = [(family, ALL) for family in FAMILIES]
CASES += [(family, NORMS) for family in FAMILIES if family != "bert"]


@pytest.mark.parametrize(("family", "sites"), CASES)
@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1e-5), (torch.float64, 1e-6)])
def test_a_scale_and_a_shift_change_no_logit(family, sites, dtype, share):
    # float64 finds its limit in norms that compute in float32 whatever comes in
    task, batch = task_of(family).to(dtype), joined(family)
    before = logits(task, batch)
    for seed, channels in enumerate(every(task, sites)):
        scale = random_scale(channels, seed, dtype)
        shift = random_scale(channels, -seed, dtype) if channels.shiftable else None
        channels.fold(scale, shift)
    close(logits(task, batch), before, share)


@pytest.mark.parametrize("family", FAMILIES)
def test_live_shifts_are_the_folded_ones(family):
    live, folded, batch = task_of(family), task_of(family), joined(family)
    with ExitStack() as stack:
        for seed, (one, two) in enumerate(zip(every(live, ALL), every(folded, ALL), strict=True)):
            scale = random_scale(one, seed)
            shift = random_scale(one, -seed) if one.shiftable else None
            two.fold(scale, shift)
            follow = None if shift is None else (lambda shift=shift: shift)
            stack.enter_context(one.live(lambda scale=scale: scale, follow))
        close(logits(live, batch), logits(folded, batch), 1e-6)
        for one, two in zip(every(live, ALL), every(folded, ALL), strict=True):
            torch.testing.assert_close(one.linears[0].weight, two.linears[0].weight)


@pytest.mark.parametrize("family", FAMILIES)
def test_live_scales_are_the_folded_ones_and_leave_nothing_behind(family):
    task, batch = task_of(family), joined(family)
    plain = copy.deepcopy(task.model.state_dict())
    sites = every(task, ALL)
    first = sites[0]
    scale = random_scale(first, 0)
    with first.live(lambda: scale):
        live = logits(task, batch)
        seen = first.linears[0].weight.clone()
    assert task.model.state_dict().keys() == plain.keys()
    for name, tensor in task.model.state_dict().items():
        assert torch.equal(tensor, plain[name])
    first.fold(scale)
    assert torch.equal(first.linears[0].weight, seen)
    assert torch.equal(logits(task, batch), live)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tensor_between_is_divided_by_the_scale(family):
    task, batch = task_of(family), joined(family)
    for channels in channels_of(task, 1, ALL):
        seen: list[torch.Tensor] = []
        hook = lambda _, args, seen=seen: seen.append(args[0])  # noqa: E731
        handle = channels.linears[0].register_forward_pre_hook(hook)
        logits(task, batch)
        scale = random_scale(channels, 3)
        channels.fold(scale)
        logits(task, batch)
        handle.remove()
        expected = seen[0] / channels.spread(scale)
        torch.testing.assert_close(seen[1], expected, rtol=1e-3, atol=1e-4)


def test_query_heads_share_the_channels_of_their_value_head():
    task = task_of("llama")
    value = channels_of(task, 0, ALL)[1]
    assert (value.heads, value.repeats) == (2, 2)
    spread = value.spread(torch.arange(32.0))
    assert torch.equal(spread[:16], spread[16:32]) and torch.equal(spread[:16], torch.arange(16.0))
    assert torch.equal(value.gather(torch.arange(64.0))[:16], torch.arange(16.0, 32.0))


def test_post_norm_families_are_refused_with_the_reason():
    with pytest.raises(UserError, match=r"behind the residual sums.*norms\+value\+up"):
        channels_of(task_of("bert"), 0, "norms")
    assert len(channels_of(task_of("bert"), 0, ALL)) == 1
    with pytest.raises(UserError, match=r"transform\.sites=all"):
        channels_of(task_of("llama"), 0, "all")
