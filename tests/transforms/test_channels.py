"""Channel scales: the function of every family is unchanged, folded or live."""

import copy
from contextlib import ExitStack

import pytest
import torch
from helpers.channels import ALL, NORMS, VALUES, close, every, logits, random_scale
from helpers.models import FAMILIES, joined, task_of, tiny

from qexp.arch import arch_of
from qexp.common.errors import UserError
from qexp.transforms.channels import channels_of

LAST = ("fc1", "mlp.up_proj")
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
    with pytest.raises(UserError, match=r"post-norm.*norms\+value"):
        channels_of(task_of("bert"), 0, "norms")
    assert len(channels_of(task_of("bert"), 0, ALL)) == 1
    with pytest.raises(UserError, match=r"transform\.sites=all"):
        channels_of(task_of("llama"), 0, "all")


def names(task, sites: str) -> list[str]:
    return [channels.name.partition(".0.")[2] for channels in channels_of(task, 0, sites)]


def test_what_comes_out_of_a_relu_is_a_site_and_of_a_gelu_is_not():
    """As AWQ's reference has it for OPT, and cross-layer equalization for ReLU networks."""
    assert names(task_of("opt"), ALL)[-1] == "fc1"
    assert "mlp.c_fc" not in names(task_of("gpt2"), ALL)
    relu = tiny("gpt2", sizes={"activation_function": "relu"}).model
    assert arch_of(relu).groups[-1].producer == "mlp.c_fc"
    gelu = tiny("opt", sizes={"activation_function": "gelu"}).model
    assert arch_of(gelu).groups[-1].producer is None
    assert not arch_of(relu).gated and arch_of(task_of("llama").model).gated


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_values_are_sites_of_their_own(family):
    """Where OmniQuant's reference has its scales: norms and values, nothing inside of the MLP."""
    found = names(task_of(family), VALUES)
    assert found == [name for name in names(task_of(family), ALL) if name not in LAST]
    assert "self_attn.v_proj" in found
