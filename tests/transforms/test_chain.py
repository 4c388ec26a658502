"""Chains of transforms: composed by Hydra, in order, refused where they leave what nothing expects;
and runs whose models compute online maps."""

import json

import pytest
import torch
from helpers.channels import close, logits
from helpers.models import joined, task_of
from helpers.pipeline import PPL, run
from hydra import compose
from hydra.errors import HydraException
from safetensors import safe_open
from safetensors.torch import save_file

from qexp.common.errors import UserError
from qexp.config import messages
from qexp.config.chains import as_choices
from qexp.config.instantiate import instantiate
from qexp.packed import weights_file
from qexp.runs.signature import signature
from qexp.transforms.chain import Chain
from qexp.transforms.rotate import Rotate

pytestmark = pytest.mark.usefixtures("configured")

QUAROT = ("transform=quarot", "activation=int4_token", "kv=quarot", "weight=channel_narrow")


def test_a_list_is_a_choice_whose_steps_have_the_settings_of_their_files():
    words = ["transform=none,[rotate, smooth]", "eval=[loss]"]
    assert as_choices(words) == ["transform=none,rotate+smooth", "eval=[loss]"]
    cfg = compose("config", ["transform=rotate+smooth+rotate", "transform.steps.smooth.alpha=0.8"])
    step = instantiate(cfg.transform)
    assert list(step.order) == ["rotate", "smooth", "rotate_2"]
    assert step.steps["smooth"].alpha == 0.8 and step.steps["rotate_2"] == Rotate()


def test_another_order_is_another_run():
    one, other = (
        compose("config", [f"transform={words}"]) for words in ("rotate+smooth", "smooth+rotate")
    )
    assert signature(one) != signature(other)


def test_a_misspelt_step_is_named():
    with pytest.raises(HydraException) as error:
        compose("config", ["transform=rotat+smooth"])
    assert "did you mean rotate?" in messages.message_for(error.value)


def test_a_chain_of_one_is_the_step_and_exact_steps_change_no_logit():
    batch, expected = joined("llama"), logits(task_of("llama"), joined("llama"))
    alone, chained, several = (task_of("llama") for _ in range(3))
    Rotate()(alone, lambda: [])
    Chain({"rotate": Rotate()}, ["rotate"])(chained, lambda: [])
    assert torch.equal(logits(alone, batch), logits(chained, batch))
    cfg = compose("config", ["transform=smooth+quarot", "model=tiny_llama"])
    instantiate(cfg.transform)(several, lambda: [batch])
    close(logits(several, batch), expected, 1e-4)
    assert len(several.maps) == 9


def test_names_and_order_must_agree():
    with pytest.raises(UserError, match=r"name each of transform\.steps once"):
        Chain({"rotate": Rotate()}, ["rotate", "rotate"])


def test_a_step_that_quantizes_is_refused(tmp_path):
    words = ["transform=rotate+smooth", "transform.steps.smooth=${method}"]
    with pytest.raises(UserError, match=r"transform.steps.smooth: it (quantizes|would leave)"):
        run(tmp_path, "model=tiny_llama", "method=rtn", *words)


def test_through_a_map_nothing_is_scaled(tmp_path):
    words = ["transform=quarot+smooth", "transform.steps.smooth.sites=norms+value+up"]
    with pytest.raises(UserError, match=r"put it last, transform=\[smooth,quarot\]"):
        run(tmp_path, "model=tiny_llama", "method=none", *words)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("llama", [*QUAROT, "method=rtn"]),
        ("gpt2", [*QUAROT, "method=gptq"]),
        ("gemma3", [*QUAROT, "transform.stream=false", "method=none"]),
        ("opt", ["transform=smooth+quarot", "method=llm_qat", "trainer=smoke", "weight=int"]),
    ],
    ids=str,
)
def test_a_run_with_maps_reloads_to_the_same_number(tmp_path, family, words):
    first = run(tmp_path / "first", f"model=tiny_{family}", *words)
    again = run(tmp_path / "again", "model=from_run", f"run={tmp_path / 'first'}", small=[])
    assert again[PPL] == first[PPL]


def test_the_float_model_with_maps_can_be_quantized_later(tmp_path):
    words = ["model=tiny_llama", "transform=quarot"]
    run(tmp_path / "float", *words, "method=none")
    later = ["model=from_run", f"run={tmp_path / 'float'}", "method=rtn", "weight.group_size=32"]
    second = run(tmp_path / "second", *later, small=[])
    at_once = run(tmp_path / "at_once", *words, "method=rtn")
    assert second[PPL] == pytest.approx(at_once[PPL], rel=1e-6)
    third = run(tmp_path / "third", "model=from_run", f"run={tmp_path / 'second'}", small=[])
    assert third[PPL] == second[PPL]


def test_only_matrices_cost_bits(tmp_path):
    words = ["method=rtn", "model=tiny_llama", "transform=quarot", "transform.stream=false"]
    free = run(tmp_path / "free", *words)
    assert "weight/online_bits" not in free
    six = ["model.sizes.hidden_size=96", "model.sizes.num_attention_heads=6"]
    stored = run(tmp_path / "stored", *words, *six)
    matrices = 3 * 16 * 3 * 3  # in each block one of 3 rows, the other factor is a Hadamard of 2
    assert stored["weight/online_bits"] == pytest.approx(matrices / stored["weight/count"])
    again = run(tmp_path / "again", "model=from_run", f"run={tmp_path / 'stored'}", small=[])
    assert again[PPL] == stored[PPL]


def test_a_file_without_its_maps_is_refused(tmp_path):
    run(tmp_path, "model=tiny_llama", "transform=quarot", "method=rtn")
    path = tmp_path / weights_file.FILE
    with safe_open(path, "pt") as file:
        layout = file.metadata()["layout"]
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata={"layout": layout})
    with pytest.raises(UserError, match="lacks the online maps"):
        run(tmp_path / "again", "model=from_run", f"run={tmp_path}", small=[])
    wrong = json.dumps({"model.layers.7.mlp.down_proj.input": [["hadamard", 128]]})
    save_file(tensors, path, metadata={"layout": layout, "maps": wrong})
    with pytest.raises(UserError, match="which no site is"):
        run(tmp_path / "again", "model=from_run", f"run={tmp_path}", small=[])
