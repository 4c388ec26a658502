"""QuaRot: each rotation leaves the function of every family alone, and outliers spread."""

import pytest
import torch
from helpers.channels import close, drift, logits, planted
from helpers.models import FAMILIES, joined, task_of

from qexp.common.errors import UserError
from qexp.grid import IntGrid
from qexp.methods.blockwise import Direct
from qexp.quantizers.placement import LinearInputs
from qexp.quantizers.scheme import QuantizedActivations
from qexp.solvers.rtn import RTN
from qexp.transforms.rotate import ONLINE, Rotate, rotation
from qexp.transforms.smooth import Smooth

STREAM = [family for family in FAMILIES if family not in ("bert", "gemma3")]
ALL = {"values": True, "online": ONLINE}
NARROW = IntGrid(4, symmetric=True, narrow=True)
TOKEN = QuantizedActivations(LinearInputs(), NARROW, dynamic=True)


def applied(family: str, step: Rotate, dtype=torch.float32):
    task = task_of(family).to(dtype)
    step(task, lambda: pytest.fail("no data is asked for"))
    return task


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("online", [(), *((each,) for each in ONLINE), ONLINE], ids=str)
def test_no_online_rotation_changes_a_logit(family, online):
    expected = logits(task_of(family), joined(family))
    step = Rotate(stream=False, values=online == ONLINE, online=online)
    close(logits(applied(family, step), joined(family)), expected, 1e-4)


@pytest.mark.parametrize("family", STREAM)
@pytest.mark.parametrize("kind", ["hadamard", "hadamard_exact"])
def test_all_rotations_together_change_no_logit(family, kind):
    expected = logits(task_of(family).double(), joined(family))
    task = applied(family, Rotate(kind, **ALL), torch.float64)
    close(logits(task, joined(family)), expected, 1e-6)  # RMS norms compute in float32


def test_without_the_others_it_is_the_rotation_of_the_stream_bit_for_bit():
    one, other = applied("llama", Rotate()), applied("llama", Rotate(values=False, online=[]))
    assert torch.equal(logits(one, joined("llama")), logits(other, joined("llama")))
    assert not one.maps and not other.maps


def test_values_are_turned_in_the_weights():
    before, after = task_of("llama"), applied("llama", Rotate(stream=False, values=True))
    close(logits(after, joined("llama")), logits(before, joined("llama")), 1e-5)
    moved = after.blocks[0].self_attn.v_proj.weight - before.blocks[0].self_attn.v_proj.weight
    assert float(moved.detach().norm()) > 0.1 and not after.maps


def kurtosis(x: torch.Tensor) -> float:
    x = x.double().flatten() - x.double().mean()
    return float(x.pow(4).mean() / x.square().mean() ** 2)


@pytest.mark.parametrize("linear", ["self_attn.o_proj", "mlp.down_proj"])
def test_outliers_before_the_last_linears_are_spread(linear):
    batch, found = joined("llama"), []
    for online in ((), ("heads", "down")):
        task = task_of("llama")
        up, value = task.blocks[0].mlp.up_proj, task.blocks[0].self_attn.v_proj
        up.weight.data[5] *= 100
        value.weight.data[5] *= 100
        Rotate(stream=False, values=bool(online), online=online)(task, lambda: [])
        seen: list[torch.Tensor] = []
        module = task.blocks[0].get_submodule(linear)
        handle = module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        task.encode(batch)
        handle.remove()
        found.append(kurtosis(seen[0].detach()))
    assert found[1] < 0.4 * found[0]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_planted_outliers_cost_less_with_every_rotation(family):
    batch = joined(family)
    expected = logits(planted(family), batch)
    errors = []
    for steps in ([], [Rotate()], [Rotate(**ALL)]):
        task = planted(family)
        for step in [*steps, Direct(RTN(NARROW), [TOKEN])]:
            step(task, lambda: [batch])
        errors.append(drift(task, batch, expected))
    assert errors[2] < 0.5 * errors[0] and errors[1] < 0.5 * errors[0]


def test_the_exact_rotation_has_one_magnitude_but_for_the_vector_of_ones():
    q = rotation(576, "hadamard_exact", torch.Generator().manual_seed(0))
    eye = torch.eye(576, dtype=torch.float64)
    torch.testing.assert_close(q @ q.T, eye)
    assert float(q.abs().max()) < 0.2
    with pytest.raises(UserError, match="no Hadamard matrix of 7 rows"):
        rotation(7, "hadamard_exact", torch.Generator())


def test_channels_are_not_scaled_through_a_map():
    task = applied("llama", Rotate(**ALL))
    step = Smooth(NARROW, TOKEN, sites="norms+value+up")
    with pytest.raises(UserError, match=r"an online map lies before self_attn\.o_proj"):
        step(task, lambda: [joined("llama")])
    with pytest.raises(UserError, match="an online map lies before"):
        Rotate(**ALL)(task, lambda: [])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"online": ["head"]}, "head is unknown; give a list of heads, down, keys"),
        ({"kind": "givens"}, "give hadamard, random or identity"),
    ],
)
def test_unknown_words_are_refused(fields, said):
    with pytest.raises(UserError, match=said):
        Rotate(**fields)


def test_values_that_one_linear_makes_with_queries_need_the_online_rotation():
    with pytest.raises(UserError, match=r"add heads to transform\.online"):
        Rotate(values=True, online=["down"])(task_of("gpt2"), lambda: [])
