"""Trained parameters, their final values, and the parts of the model that do not change."""

import math
import re
from dataclasses import dataclass, replace

import pytest
import torch
from helpers.models import batches, task_of
from helpers.training import METHOD, SMOKE, STATIC, same, weights
from torch import Tensor, nn

from qexp.gradients import Hard, Sigmoid, Soft, Straight
from qexp.grid import IntGrid
from qexp.methods.block_phase import BlockPhase
from qexp.methods.journal import Finished, Journal
from qexp.methods.reconstruction import Reconstruction
from qexp.methods.units import Units
from qexp.methods.write_back import record
from qexp.quantizers.activation import FakeQuant
from qexp.quantizers.fake_quantize import FakeQuantize
from qexp.quantizers.parametrization import weight_quantizer
from qexp.quantizers.placement import AllOps
from qexp.quantizers.scale_rules import LSQ, Dynamic, FixedCodes
from qexp.quantizers.scheme import QuantizedActivations
from qexp.solvers.rtn import RTN
from qexp.task import Task
from qexp.training.losses import CrossEntropy, Penalty, Watch
from qexp.training.optimizer import AdamW
from qexp.training.trainable import TrainableParameters
from qexp.training.trainer import Trainer
from qexp.walk import Block


def test_the_model_is_left_plain(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = task_of()
    task.requires_grad_(False)
    names, cached = list(task.state_dict()), task.model.config.use_cache
    records = replace(METHOD, activations=[STATIC])(task, lambda: batches("llama"))
    assert not any(p.requires_grad for p in task.parameters()) and not task.training
    assert task.model.config.use_cache == cached
    assert [name for name in task.state_dict() if "quantizers" not in name] == names
    assert not any(list(q.parameters()) for q in task.quantizers.values())
    for made, (name, linear) in zip(records, task.linears().items(), strict=True):
        assert made.name == name and type(linear) is nn.Linear
        assert torch.equal(made.packed.dequantize(), linear.weight)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("grid", "scale"),
    [
        (IntGrid(3, group_size=16, scale_dtype="float16"), LSQ("range", offset=True)),
        (IntGrid(2, symmetric=True, per_tensor=True), LSQ()),
        (IntGrid(3, group_size=16, real_zero=True, scale_dtype="float16"), FixedCodes(True)),
        (IntGrid(3, scale_dtype="bfloat16"), Dynamic()),
    ],
    ids=str,
)
def test_baked_weights_are_those_that_trained(grid, scale):
    task, data = task_of(), batches("llama", 1)
    method = replace(METHOD, weight=grid, scale=scale)
    method.install(task, task.linears())
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], 0.02)
    for _ in range(3):
        task.loss(data[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
    live = {name: linear.weight.detach() for name, linear in task.linears().items()}
    for name, linear in task.linears().items():
        record(name, linear, grid, 0.0)
        assert torch.equal(linear.weight, live[name])


def test_fixed_codes_are_those_of_rounding_to_nearest():
    task, data = task_of(), batches("llama")
    floats = {name: linear.weight.detach().clone() for name, linear in task.linears().items()}
    grid = IntGrid(3, group_size=16)
    trained = TrainableParameters(weights=False, norms=False)
    method = replace(METHOD, weight=grid, scale=FixedCodes(), trained=trained)
    records = replace(method, optimizer=AdamW(scales=1e-2))(task, lambda: data)
    for made in records:
        nearest = RTN(grid)(floats[made.name], None).packed
        assert torch.equal(made.packed.codes, nearest.codes)
        assert not torch.equal(made.packed.scale, nearest.scale)


@pytest.mark.parametrize(
    ("trained", "moves"),
    [
        (TrainableParameters(weights=False, scales=False, ranges=False), "norm"),
        (TrainableParameters(weights=False, norms=False, scales=False), "quantizers"),
        (TrainableParameters(weights=False, norms=False, ranges=False), "nothing of its own"),
        (TrainableParameters(norms=False, scales=False, ranges=False), "embed_tokens|lm_head"),
        (
            TrainableParameters(norms=False, scales=False, ranges=False, embeddings=False),
            "nothing of its own",
        ),
    ],
    ids=str,
)
def test_only_what_is_asked_for_moves(trained, moves):
    task, data = task_of(), batches("llama")
    reference = task_of()
    replace(
        METHOD,
        activations=[STATIC],
        trainer=Trainer(1, 1, 1, 1),
        trained=trained,
        optimizer=AdamW(0.0, 0.0),
    )(reference, lambda: data)
    before = weights(reference)
    method = replace(METHOD, activations=[STATIC], trained=trained)
    method(task, lambda: data)
    changed = {
        name
        for name, tensor in weights(task).items()
        if not torch.equal(tensor, before[name]) and ".self_attn." not in name.replace("/", ".")
    }
    changed = {name for name in changed if ".mlp." not in name or "quantizers" in name}
    assert all(re.search(moves, name) for name in changed)
    assert changed or moves == "nothing of its own"


@pytest.mark.parametrize("family", ["gpt2", "opt", "qwen3", "gemma3", "gpt_neox", "bert", "vit"])
def test_families_train(family):
    data = batches(family, rows=2)
    task = task_of(family)
    with torch.no_grad():
        for linear in task.linears().values():
            assert linear.weight.isfinite().all()
    grid = IntGrid(6, per_tensor=True)
    records = replace(METHOD, activations=[QuantizedActivations(AllOps(), grid)])(
        task, lambda: data
    )
    assert len(records) == len(task.linears())


@dataclass(frozen=True)
class Large(Penalty):
    """The mean square of the last norm's output, a thousandfold."""

    def watch(self, task: Task) -> "Seen":
        return Seen(task)


class Seen(Watch):
    def __init__(self, task: Task) -> None:
        self.task, self.values = task, []

    def __enter__(self) -> "Seen":
        norm = self.task.model.get_submodule(self.task.arch.norm)
        self.handle = norm.register_forward_hook(
            lambda _, __, output: self.values.append(output.square().mean())
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()

    def take(self, loss: Tensor) -> Tensor:
        assert len(self.values) == 1
        return 1000 * self.values.pop()


def test_activations_may_have_a_rounding_of_their_own():
    """The slope that a static quantizer lets through is that of `activation_rounding`."""
    slopes = []
    for own in (None, Straight()):
        task = task_of()
        quantizer = FakeQuant(IntGrid(4, per_tensor=True), dynamic=False)
        quantizer.start_observing()
        x = torch.linspace(0.1, 0.9, 7)[None]
        quantizer(x)
        quantizer.fix_range()
        task.quantizers["one"] = quantizer
        method = replace(METHOD, rounding=Sigmoid(40, "raw"), activation_rounding=own)
        method.install(task, {})
        leaf = x.clone().requires_grad_()
        quantizer(leaf).sum().backward()
        slopes.append(leaf.grad)
    assert torch.equal(slopes[1][:, 1:-1], torch.ones(1, 5))
    assert not torch.equal(slopes[0], slopes[1])


def test_a_penalty_joins_the_loss_of_a_float_model():
    task, data = task_of(), batches("llama")
    method = replace(METHOD, weight=None, penalty=Large(), trainer=replace(SMOKE, steps=12))

    def size() -> float:
        with torch.no_grad():
            return float(task.encode(data[0]).square().mean())

    before = size()
    assert method(task, lambda: data) == []
    assert size() < before * 0.99


def test_each_kind_has_its_own_rate():
    groups = (
        AdamW(1e-5, 1e-3, 1e-2, weight_decay=0.1)
        .optimizer(
            {kind: [nn.Parameter(torch.ones(1))] for kind in ("weights", "scales", "offsets")}
        )
        .param_groups
    )
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(1e-5, 0.1), (1e-3, 0), (1e-2, 0)]


@pytest.mark.parametrize(("relative", "moved"), [(True, (0.99, 0.99)), (False, (-9.0, 0.9991))])
def test_rates_of_scales_are_shares_of_them(relative, moved):
    """Of one a thousandth and one ten, after one step of Adam, which moves by the rate itself."""
    scales = [nn.Parameter(torch.tensor([[value]])) for value in (1e-3, 10.0)]
    rule = AdamW(scales=1e-2, relative=relative, warmup=0.0)
    starts = [float(scale.detach()) for scale in scales]
    optimizer = rule.optimizer({"scales": scales})
    sum(scale.sum() for scale in scales).backward()
    optimizer.step()
    shares = [float(scale.detach()) / start for scale, start in zip(scales, starts, strict=True)]
    assert shares == pytest.approx(moved, rel=1e-3)


def test_lsq_starts_where_the_paper_does():
    linear = nn.Linear(32, 6)
    method = replace(METHOD, scale=LSQ())
    method.install(task_of(), {"one": linear})
    weight = linear.parametrizations.weight.original
    expected = 2 * weight.abs().mean(1, keepdim=True) / math.sqrt(7)
    torch.testing.assert_close(weight_quantizer(linear).scale, expected)


@pytest.mark.parametrize("group", [None, 8])
def test_steps_of_weights_have_lsq_s_share_of_the_gradient(group):
    """1902.08153, section 2.2: 1/√(N q_p), N the weights that share a step, q_p the top code."""
    linear = nn.Linear(32, 6, bias=False)
    grid = IntGrid(4, symmetric=True, group_size=group)
    replace(METHOD, weight=grid, scale=LSQ("range")).install(task_of(), {"one": linear})
    weight_quantizer(linear).scale.data *= 0.6  # so that some are clipped
    upstream = torch.randn(6, 32, generator=torch.Generator().manual_seed(2))
    (linear.weight * upstream).sum().backward()
    scale = weight_quantizer(linear).scale.detach()
    shape = (*scale.shape, -1)
    v = linear.parametrizations.weight.original.detach().view(shape) / scale[..., None]
    slope = torch.where((v > -8) & (v < 7), v.round() - v, v.clamp(-8, 7))
    count = group or 32
    expected = (upstream.view(shape) * slope).sum(-1) / math.sqrt(count * 7)
    torch.testing.assert_close(weight_quantizer(linear).scale.grad, expected, rtol=1e-4, atol=1e-5)


def test_ranges_of_activations_have_lsq_s_share_of_the_gradient():
    """N is all values of the tensor; codes lie up to 15 above a zero point of 0."""
    quantizer = FakeQuant(IntGrid(4, per_tensor=True), dynamic=False)
    quantizer.start_observing()
    quantizer(torch.linspace(0, 3, 50)[None])
    quantizer.fix_range()
    quantizer.make_trainable(FakeQuantize(), False)
    x = torch.linspace(0, 5, 33)[None, None]
    quantizer(x).sum().backward()
    v = x / quantizer.scale.detach()
    slope = torch.where(v < 15, v.round() - v, torch.tensor(15.0))
    expected = slope.sum() / math.sqrt(33 * 15)
    torch.testing.assert_close(quantizer.scale.grad.squeeze(), expected, rtol=1e-4, atol=1e-5)


def test_blocks_trained_one_by_one_are_nearer_to_the_float_model():
    """EfficientQAT's first phase against the same rule without a step."""
    data = [{"input_ids": torch.cat([batch["input_ids"] for batch in batches("llama", 4)])}]
    grid = IntGrid(2, group_size=16)

    def distance(rate: float) -> float:
        exact, task = task_of(), task_of()
        optimizer = AdamW(rate, rate, rate)
        phase = BlockPhase(grid, FakeQuantize(), LSQ("range", offset=True), optimizer, epochs=20)
        made = phase(task, data, Journal({"rate": rate}))
        assert len(made) == len(task.linears())
        for one, (name, linear) in zip(made, task.linears().items(), strict=True):
            assert one.name == name and torch.equal(one.packed.dequantize(), linear.weight)
        with torch.no_grad():
            gap = task.encode(data[0]) - exact.encode(data[0])
        return float(gap.square().mean())

    assert distance(1e-3) < 0.7 * distance(0.0)


def test_the_clamp_of_blocks_trained_one_by_one_acts():
    data = [{"input_ids": torch.cat([batch["input_ids"] for batch in batches("llama", 4)])}]
    made = []
    for clamp in (Hard(), Soft("silu")):
        task = task_of()
        phase = BlockPhase(
            IntGrid(2, group_size=16),
            FakeQuantize(clamp=clamp),
            LSQ("range"),
            AdamW(1e-3, 1e-3, 1e-3),
        )
        phase(task, data, Journal({"clamp": str(clamp)}))
        made.append(weights(task))
    assert not same(*made)


@pytest.mark.parametrize("death", ["block", "end"])
def test_efficient_qat_goes_on_where_it_was_killed(tmp_path, monkeypatch, death):
    """At its third block, or in the last leg of its end phase, with the numbers of a whole run."""
    data, grid = batches("llama"), IntGrid(3, group_size=16, scale_dtype="float16")
    phase = BlockPhase(grid, FakeQuantize(), LSQ("range", offset=True), AdamW(1e-3, 1e-3, 1e-3))
    end = replace(
        METHOD, weight=grid, scale=FixedCodes(), trained=TrainableParameters(False, False)
    )
    method, trained = Reconstruction(phase, end), []

    def run(name: str) -> Task:
        monkeypatch.setenv("QEXP_CACHE_DIR", str(tmp_path / f"cache of {name}"))
        task = task_of(folder=tmp_path / name)
        assert len(method(task, lambda: data)) == len(task.linears())
        return task

    def finish(self: BlockPhase, block: Block, units: Units) -> Finished:
        if death == "block" and len(trained) == 2:
            raise KeyError("killed")
        trained.append(block.index)
        return plain(self, block, units)

    def loss(self: CrossEntropy, task: Task, *rest: object) -> Tensor:
        calls.extend([1] if task.training else [])
        if len(calls) == 5:
            raise KeyError("killed")
        return cross_entropy(self, task, *rest)

    whole = run("whole")
    plain, cross_entropy, calls = BlockPhase._finish, CrossEntropy.__call__, []
    with monkeypatch.context() as patch, pytest.raises(KeyError, match="killed"):
        patch.setattr(BlockPhase, "_finish", finish)
        if death == "end":
            patch.setattr(CrossEntropy, "__call__", loss)
        run("killed")
    before = list(trained)
    death = "none"
    monkeypatch.setattr(BlockPhase, "_finish", finish)
    again = run("killed")
    assert before + trained[len(before) :] == [0, 1, 2]
    for log in ("training.csv", "training_blocks.csv"):
        one, two = ((tmp_path / name / log).read_text() for name in ("killed", "whole"))
        assert one == two and "scale" in one
    assert same(weights(again), weights(whole))
    again.workspace.clear()
    assert not list((tmp_path / "cache of killed" / "blocks").glob("*.safetensors"))
