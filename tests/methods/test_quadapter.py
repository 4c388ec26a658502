"""Quadapter's second phase: what trains, what stays, and that what was trained is deployed."""

import pytest
import torch
from helpers.channels import ALL, NORMS, TENSOR, close, every, logits, planted
from helpers.models import FAMILIES, joined, task_of
from helpers.pipeline import PPL, run
from hydra import compose

from qexp.common.errors import UserError
from qexp.config.instantiate import instantiate
from qexp.grid import IntGrid
from qexp.quantizers.channel_scale import Alpha
from qexp.quantizers.fake_quantize import FakeQuantize
from qexp.quantizers.parametrization import attach_weight_quantizer, bake
from qexp.quantizers.scale_rules import Dynamic
from qexp.quantizers.scheme import quantize_activations

pytestmark = pytest.mark.usefixtures("configured")


GRID = IntGrid(8, symmetric=True, per_tensor=True)
PHASE2 = (
    "method=quadapter",
    "trainer.steps=4",
    "weight.group_size=null",
    "weight.bits=8",
    "activation=int8_tensor",
)


def alphas(sites, size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for channels in sites:
        theta = size * torch.randn(len(channels.weights()), generator=generator)
        channels.install(Alpha(theta))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weights", [True, False])
@torch.no_grad()
def test_what_was_live_is_what_stays(family, weights):
    """With weights rounded or not, every site at once."""
    task, batch = task_of(family), joined(family)
    names, expected = set(task.state_dict()), logits(task, batch)
    sites = every(task, ALL)
    alphas(sites, 0.5)
    close(logits(task, batch), expected, 1e-4)
    if weights:
        for linear in task.linears().values():
            attach_weight_quantizer(linear, Dynamic(), GRID, FakeQuantize())
    live = logits(task, batch)
    if weights:
        for linear in task.linears().values():
            bake(linear)
    for channels in sites:
        channels.bake()
    assert set(task.state_dict()) == names
    torch.testing.assert_close(logits(task, batch), live)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_alpha_of_one_is_the_plain_quantizer(family):
    tasks, batch = (task_of(family), task_of(family)), joined(family)
    alphas(every(tasks[0], ALL), 0.0)
    for task in tasks:
        for linear in task.linears().values():
            attach_weight_quantizer(linear, Dynamic(), GRID, FakeQuantize())
        quantize_activations(task, [TENSOR], lambda: [batch])
    assert torch.equal(logits(tasks[0], batch), logits(tasks[1], batch))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("sites", [NORMS, ALL])
def test_both_phases_run_and_reload_to_the_same_number(tmp_path, family, sites):
    where = (f"method.sites={sites}", f"transform.sites={sites}", "transform.steps=2")
    first = run(tmp_path / "first", f"model=tiny_{family}", *PHASE2, "transform=quadapter", *where)
    again = run(tmp_path / "again", "model=from_run", f"run={tmp_path / 'first'}", small=[])
    assert again[PPL] == first[PPL]
    if sites == ALL:
        left = ("model=from_run", f"run={tmp_path / 'first'}", "transform=smooth")
        with pytest.raises(UserError, match="activation quantizers already"):
            run(tmp_path / "more", *left, small=[])


def test_only_scales_and_ranges_move(tmp_path):

    cfg = compose("config", [*PHASE2, "data=synthetic", "method.training.optimizer.channels=0.05"])
    step = instantiate(cfg.method)
    task, batch = planted("opt", 20), joined("opt")
    before = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    step(task, lambda: [batch])
    norm, own = "model.decoder.layers.0.self_attn_layer_norm", "model.model.decoder.layers.0"
    scale = before[f"model.{norm}.weight"] / task.state_dict()[f"model.{norm}.weight"]
    assert float((scale - 1).abs().max()) > 0.05
    torch.testing.assert_close(
        before[f"model.{norm}.bias"] / scale, task.state_dict()[f"model.{norm}.bias"]
    )
    for name in ("model.lm_head.weight", "model.model.decoder.embed_positions.weight"):
        assert torch.equal(task.state_dict()[name], before[name])
    assert torch.equal(task.state_dict()[f"{own}.fc2.bias"], before[f"{own}.fc2.bias"])
    folded = before[f"{own}.self_attn.q_proj.weight"] * scale
    found = task.state_dict()[f"{own}.self_attn.q_proj.weight"]
    assert float((folded - found).norm() / folded.norm()) < 0.05
    assert all(parameter.grad is None for parameter in task.parameters())


def test_training_lowers_the_loss_that_outliers_cost():

    batch = joined("llama")
    plain = planted("llama", 20)
    quantize_activations(plain, [TENSOR], lambda: [batch])
    overrides = ["trainer.steps=40", "method.training.optimizer.channels=0.05"]
    step = instantiate(compose("config", [*PHASE2, *overrides]).method)
    trained = planted("llama", 20)
    step(trained, lambda: [batch])
    with torch.no_grad():
        assert trained.loss(batch) < plain.loss(batch)
