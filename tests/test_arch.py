"""The facts of ARCHS against what transformers' modules do, for every family."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import pytest
import torch
from helpers.models import FAMILIES, batches, task_of, tiny
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BloomConfig

from qexp.arch import ARCHS, arch_of
from qexp.common.errors import UserError

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


class Seen(NamedTuple):
    """The first block in one forward: its modules as they were called, what went through."""

    order: list[str]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    logits: Tensor


def look(model: nn.Module, batch: dict) -> Seen:
    arch = arch_of(model)
    prefix = f"{arch.blocks}.0."
    seen = Seen([], {}, {}, torch.empty(0))

    def hook(name: str):
        def record(_module: nn.Module, args: tuple, output: Tensor) -> None:
            seen.order.append(name)
            if args:  # ids of an embedding come as keywords in some families
                seen.inputs[name] = args[0]
            seen.outputs[name] = output[0] if isinstance(output, tuple) else output

        return record

    handles = [
        module.register_forward_hook(hook(name.removeprefix(prefix)))
        for name, module in model.named_modules()
    ]
    with torch.no_grad():
        output = model(**batch)
    for handle in handles:
        handle.remove()
    return seen._replace(logits=output.logits)


@cache
def first(family: str) -> Seen:
    return look(tiny(family).model, batches(family)[0])


def block(model: nn.Module, index: int = 0) -> nn.Module:
    return model.get_submodule(arch_of(model).blocks)[index]


def block_path(family: str) -> str:
    return f"{arch_of(tiny(family).model).blocks}.0"


@contextmanager
def doubled(linear: nn.Linear) -> Iterator[None]:
    for parameter in linear.parameters():
        parameter.data *= 2
    yield
    for parameter in linear.parameters():
        parameter.data /= 2


@EVERY_FAMILY
def test_groups_name_exactly_the_linears_of_every_block(family):
    model = tiny(family).model
    arch = arch_of(model)
    named = [name for group in arch.groups for name in group.linears]
    assert len(named) == len(set(named))
    for index in range(3):
        modules = block(model, index).named_modules()
        assert set(named) == {name for name, module in modules if isinstance(module, nn.Linear)}


@EVERY_FAMILY
def test_groups_are_in_execution_order(family):
    groups = arch_of(tiny(family).model).groups
    group_of = {name: index for index, group in enumerate(groups) for name in group.linears}
    ran = [group_of[name] for name in first(family).order if name in group_of]
    assert ran == sorted(ran)


@EVERY_FAMILY
def test_linears_of_a_group_receive_the_same_tensor(family):
    inputs = first(family).inputs
    for group in arch_of(tiny(family).model).groups:
        for name in group.linears:
            assert inputs[name] is inputs[group.linears[0]] or torch.equal(
                inputs[name], inputs[group.linears[0]]
            )


@EVERY_FAMILY
def test_linears_of_different_groups_receive_different_tensors(family):
    inputs = first(family).inputs
    tensors = [inputs[group.linears[0]] for group in arch_of(tiny(family).model).groups]
    for index, one in enumerate(tensors):
        assert not any(one.shape == two.shape and one.equal(two) for two in tensors[:index])


@EVERY_FAMILY
def test_a_source_makes_the_input(family):
    model, batch = tiny(family).model, batches(family)[0]
    seen = first(family)
    for group in arch_of(model).groups:
        if group.producer is None:
            continue
        source, made = block(model).get_submodule(group.producer), seen.inputs[group.linears[0]]
        if not isinstance(source, nn.Linear):
            assert torch.equal(seen.outputs[group.producer], made)
            continue
        with doubled(source):
            torch.testing.assert_close(look(model, batch).inputs[group.linears[0]], 2 * made)


@EVERY_FAMILY
def test_norms_name_every_norm_of_a_block(family):
    model = tiny(family).model
    modules = block(model).named_modules()
    norms = {name for name, module in modules if type(module).__name__.endswith("Norm")}
    assert set(arch_of(model).norms) == norms


@EVERY_FAMILY
def test_norms_scale_by_their_weight_or_one_more(family):
    model = tiny(family).model
    arch = arch_of(model)
    norm = block(model).get_submodule(arch.norms[0])
    norm.weight.data.zero_()
    output = norm(torch.randn(2, norm.weight.numel())) - getattr(norm, "bias", torch.zeros(()))
    assert bool((output.abs() > 1e-3).any()) == arch.unit_offset


@EVERY_FAMILY
def test_writers_and_nothing_else_change_the_stream(family):
    model = tiny(family).model
    arch, seen = arch_of(model), first(family)
    block_io = block_path(family)
    stream = seen.inputs[block_io]
    # OPT's MLP sees all tokens in one row of a matrix
    total = stream + sum(seen.outputs[name].view_as(stream) for name in arch.writers)
    assert torch.allclose(total, seen.outputs[block_io], atol=1e-5) == arch.pre_norm


@EVERY_FAMILY
def test_embeddings_make_the_first_input(family):
    seen = first(family)
    made = sum(seen.outputs[name] for name in arch_of(tiny(family).model).embeddings)
    torch.testing.assert_close(seen.inputs[block_path(family)], made)


@EVERY_FAMILY
def test_head_of_the_last_hidden_states_gives_the_logits(family):
    model = tiny(family).model
    arch, seen = arch_of(model), first(family)
    hidden = seen.outputs[arch.norm or f"{arch.blocks}.2"]
    if family == "vit":
        hidden = hidden[:, 0]  # the class token
    with torch.no_grad():
        torch.testing.assert_close(model.get_submodule(arch.head)(hidden), seen.logits)


def test_opt_with_norms_behind_the_sums():
    sizes = {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        "opt", do_layer_norm_before=False, word_embed_proj_dim=32, vocab_size=264, **sizes
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    arch = arch_of(model)
    assert not arch.pre_norm and arch.norm is None
    seen = look(model, batches("opt")[0])
    for group in arch.groups:
        if group.producer is not None and "norm" in group.producer:
            made = seen.inputs[group.linears[0]]
            assert torch.equal(seen.outputs[group.producer].view_as(made), made)


def test_gemma3_inside_the_vision_language_model():
    text = tiny("gemma3").model.config.to_dict()
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    sizes = {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config={**vision, **sizes})
    model = AutoModelForCausalLM.from_config(config).eval()
    arch = arch_of(model)
    assert arch == ARCHS["gemma3"]
    seen = look(model, batches("gemma3")[0])
    assert set(arch.norms) | {name for group in arch.groups for name in group.linears} <= set(
        seen.order
    )
    torch.testing.assert_close(model.get_submodule(arch.head)(seen.outputs[arch.norm]), seen.logits)


def test_an_unknown_family_is_answered_with_the_known_ones():
    config = BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2)
    with pytest.raises(UserError, match=r"'bloom'.*gpt_neox.*llama"):
        arch_of(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_has_one_role(family):
    arch = task_of(family).arch
    linears = [name for group in arch.groups for name in group.linears]
    assert sorted(arch.roles.values()) == sorted(linears)
    assert {"o", "up", "down"} <= set(arch.roles) and ("gate" in arch.roles) is arch.gated
    assert arch.linears_of(["o", "down"], "key") == {arch.roles["o"], arch.roles["down"]}
