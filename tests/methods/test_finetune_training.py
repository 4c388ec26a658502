"""Training around the step: resuming, stopping, faults, data and learning rates."""

import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import pairs
from helpers.models import batches, task_of
from helpers.training import GRID, METHOD, SMOKE, STATIC, Same, same, weights
from torch import Tensor

from qexp.common.errors import UserError
from qexp.task import Task
from qexp.training import divergence, losses
from qexp.training.batches import SeededBatches, random_state, restore_random
from qexp.training.losses import CrossEntropy
from qexp.training.module import TrainingSetup
from qexp.training.optimizer import AdamW
from qexp.training.trainer import Trainer


@pytest.mark.parametrize("kind", ["validation", "none", "patience"])
def test_a_killed_run_ends_at_the_same_weights(tmp_path, monkeypatch, kind):
    """With dropout (gpt2), so that the random state counts too."""
    data = batches("gpt2", rows=3)
    validation = None if kind == "none" else Same(batches("gpt2", 1))
    trainer = replace(METHOD.trainer, patience=5) if kind == "patience" else METHOD.trainer
    method = replace(METHOD, activations=[STATIC], validation=validation, trainer=trainer)
    torch.manual_seed(5)
    whole = task_of("gpt2", tmp_path / "whole")
    method(whole, lambda: data)

    killed, plain = task_of("gpt2", tmp_path / "killed"), CrossEntropy.__call__
    torch.manual_seed(5)
    with monkeypatch.context() as patch:
        patch.setattr(losses.CrossEntropy, "__call__", dying(5))
        with pytest.raises(KeyError, match="killed"):
            method(killed, lambda: data)
    assert list((tmp_path / "killed").glob("training-*/last.ckpt"))
    again = task_of("gpt2", tmp_path / "killed")
    torch.manual_seed(99)
    ran = []

    def counting(self: CrossEntropy, task: Task, *rest: object) -> Tensor:
        ran.extend([1] if task.training else [])
        return plain(self, task, *rest)

    monkeypatch.setattr(losses.CrossEntropy, "__call__", counting)
    method(again, lambda: data)
    assert len(ran) == 2  # the last leg alone
    assert same(weights(again), weights(whole))
    for log in ("training.csv", "training_tensors.csv"):
        logs = [(tmp_path / name / log).read_text() for name in ("killed", "whole")]
        assert logs[0] == logs[1] and "oscillated" in logs[0]

    # until the results are written, the trained weights are there without another step
    third = task_of("gpt2", tmp_path / "killed")
    method(third, lambda: data)
    assert len(ran) == 2 and same(weights(third), weights(whole))
    assert list((tmp_path / "killed").glob("training-*/"))
    third.workspace.clear()
    assert not list((tmp_path / "killed").glob("training-*/"))


def test_another_run_does_not_go_on_from_it(tmp_path, monkeypatch):
    data = batches("llama", rows=2)
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # as if killed
    METHOD(task_of(folder=tmp_path), lambda: data)
    other = replace(METHOD, optimizer=AdamW(weights=2e-3))
    resumed, fresh = task_of(folder=tmp_path), task_of()
    other(resumed, lambda: data)
    other(fresh, lambda: data)
    assert same(weights(resumed), weights(fresh))
    assert len(list(tmp_path.glob("training-*/"))) == 2


@pytest.mark.parametrize("weight", [None, GRID], ids=str)
def test_accumulated_batches_are_one_batch(weight):
    data = batches("llama", rows=4)
    trainers = [
        Trainer(steps=3, sequences=4, every=3),
        Trainer(steps=3, sequences=2, accumulate=2, every=3),
        Trainer(steps=3, sequences=4, every=3, recompute=True),
    ]
    made = []
    for trainer in trainers:
        task = task_of()
        replace(METHOD, trainer=trainer, weight=weight)(task, lambda: data)
        made.append(weights(task))
    for other in made[1:]:
        for name, tensor in made[0].items():
            torch.testing.assert_close(other[name], tensor, atol=2e-5, rtol=1e-3)


def test_recomputing_changes_nothing():
    """With dropout, learned steps and static ranges; no hook of it stays."""
    made, hooks = [], []
    for recompute in (False, True):
        task = task_of("gpt2")
        torch.manual_seed(3)
        trainer = replace(SMOKE, recompute=recompute)
        replace(METHOD, activations=[STATIC], trainer=trainer)(task, lambda: batches("gpt2"))
        made.append(weights(task))
        hooks.append([len(module._forward_hooks) for module in task.model.modules()])
    assert same(*made) and hooks[0] == hooks[1]


@pytest.mark.parametrize("clip", [0.05, None])
def test_the_norm_of_all_gradients_together_is_clipped(clip):
    norms: list[float] = []

    class Watched(AdamW):
        def optimizer(self, parameters):
            def note(optimizer, *_: object) -> None:
                members = [p for group in optimizer.param_groups for p in group["params"]]
                grads = [p.grad for p in members if p.grad is not None]
                norms.append(float(torch.nn.utils.get_total_norm(grads)))

            made = super().optimizer(parameters)
            made.register_step_post_hook(note)
            return made

    replace(METHOD, optimizer=Watched(weights=1e-3, clip=clip))(task_of(), lambda: batches("llama"))
    assert len(norms) == SMOKE.steps
    if clip is None:
        assert min(norms) > 0.05
    else:
        assert norms == pytest.approx([clip] * SMOKE.steps, rel=1e-4)


def test_a_checkpoint_cut_short_is_told_of_and_training_begins_anew(tmp_path, monkeypatch, caplog):
    data = batches("llama", rows=2)
    whole = task_of()
    METHOD(whole, lambda: data)
    with monkeypatch.context() as patch, pytest.raises(KeyError, match="killed"):
        patch.setattr(losses.CrossEntropy, "__call__", dying(5))
        METHOD(task_of(folder=tmp_path), lambda: data)
    [last] = tmp_path.glob("training-*/last.ckpt")
    for _ in ("killed", "ended"):
        last.write_bytes(last.read_bytes()[:-100])
        again = task_of(folder=tmp_path)
        METHOD(again, lambda: data)
        assert f"{last.parent}: cannot be read" in caplog.text
        assert same(weights(again), weights(whole))
        caplog.clear()


def test_a_validation_that_is_not_finite_stops_the_run(tmp_path):
    task, data = task_of(), batches("llama")
    course = TrainingSetup(
        task,
        task.loss,
        {"weights": list(task.parameters())},
        data[:1],
        validation=data[1:],
        validation_loss=lambda batch: task.loss(batch) * math.nan,
        folder=tmp_path,
    )
    with pytest.raises(UserError, match=r"step 2: the validation loss is not finite"):
        SMOKE.fit(course)


def test_the_random_state_of_an_accelerator_is_kept_too(monkeypatch):
    own, device = torch.arange(4, dtype=torch.uint8), torch.device("cuda")
    put: list[Tensor] = []
    module = SimpleNamespace(
        get_rng_state=lambda device: own, set_rng_state=lambda state, device: put.append(state)
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    torch.manual_seed(1)
    states = random_state(device)
    drawn = torch.rand(3)
    restore_random(states, device)
    assert torch.equal(torch.rand(3), drawn) and torch.equal(put[0], own)


def dying(call: int) -> Callable[..., Tensor]:
    """The loss, but that it fails in training at this call."""
    calls, plain = [], CrossEntropy.__call__

    def loss(self: CrossEntropy, task: Task, *rest: object) -> Tensor:
        calls.extend([1] if task.training else [])
        if len(calls) == call:
            raise KeyError("killed")
        return plain(self, task, *rest)

    return loss


def test_a_diverged_run_names_the_step_and_the_layer():
    task = task_of()
    method = replace(METHOD, optimizer=AdamW(weights=1e30, warmup=0.0, clip=None))
    with pytest.raises(UserError, match=r"step \d+: .*finite.*(layers|norm|embed|head)"):
        method(task, lambda: batches("llama"))


def test_the_first_layer_that_overflows_is_named():
    task = task_of()
    task.blocks[1].mlp.up_proj.weight.data *= 1e30
    task.blocks[1].mlp.gate_proj.weight.data *= 1e30
    with pytest.raises(UserError, match=r"step 0: .*layers\.1\.mlp"):
        replace(METHOD, weight=None)(task, lambda: batches("llama"))


def test_the_best_weights_are_kept_and_patience_ends(tmp_path):
    """Rates so high that the first leg is the best."""
    data = batches("llama", rows=2)
    trainer = Trainer(steps=40, sequences=2, every=2, patience=3)
    optimizer = AdamW(weights=0.1, warmup=0.0)
    task = task_of(folder=tmp_path)
    other = data[1:]
    method = replace(METHOD, trainer=trainer, optimizer=optimizer, validation=Same(other))
    method(task, lambda: data[:1])
    rows = (tmp_path / "training.csv").read_text().splitlines()
    header, lines = rows[0].split(","), [row.split(",") for row in rows[1:]]
    values = [float(line[header.index("validation")]) for line in lines]
    assert len(values) < 20 and min(values[-3:]) >= min(values)
    with torch.no_grad():
        found = task.loss(other[0])
    assert float(found) == pytest.approx(min(values), rel=1e-4)

    # patience had its end, and that is known of the checkpoint: no other leg is trained
    again = task_of(folder=tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_fit", lambda *_: pytest.fail("trained on"))
        method(again, lambda: data[:1])
    assert same(weights(again), weights(task))


def test_a_run_whose_folder_is_moved_still_knows_its_best_weights(tmp_path, monkeypatch):
    data = batches("llama", rows=2)
    trainer, optimizer = Trainer(steps=6, sequences=2, every=2), AdamW(weights=0.1, warmup=0.0)
    method = replace(METHOD, trainer=trainer, optimizer=optimizer, validation=Same(data[1:]))
    whole = task_of(folder=tmp_path / "whole")
    method(whole, lambda: data[:1])
    with monkeypatch.context() as patch, pytest.raises(KeyError, match="killed"):
        patch.setattr(losses.CrossEntropy, "__call__", dying(5))
        method(task_of(folder=tmp_path / "killed"), lambda: data[:1])
    (tmp_path / "killed").rename(tmp_path / "moved")
    again = task_of(folder=tmp_path / "moved")
    method(again, lambda: data[:1])
    rows = (tmp_path / "moved" / "training.csv").read_text().splitlines()
    values = [float(row.split(",")[rows[0].split(",").index("validation")]) for row in rows[1:]]
    assert values.index(min(values)) < 2  # the best one is older than the move
    assert same(weights(again), weights(whole))


def test_what_cannot_train_is_refused_before_any_work():
    """An offloaded block."""
    task, asked = task_of(), []
    task.blocks.to("meta")
    with pytest.raises(UserError, match="offload=false"):
        METHOD(task, lambda: asked.append(1) or batches("llama"))
    assert not asked


def test_bfloat16_trains_float_weights():
    task, data = task_of(), batches("llama")
    replace(METHOD, trainer=replace(SMOKE, precision="bf16-mixed"))(task, lambda: data)
    assert {p.dtype for p in task.parameters()} == {torch.float32}
    with pytest.raises(UserError, match=r"model\.dtype"):
        METHOD(task.bfloat16(), lambda: data)


def test_rows_are_passes_in_an_order_of_the_seed():
    whole = {"input_ids": torch.arange(5)[:, None]}
    rows = SeededBatches(whole, 2, 3, 0, 10)
    drawn = torch.cat([rows[index]["input_ids"] for index in range(10)]).flatten()
    for start in range(0, 20, 5):
        assert sorted(drawn[start : start + 5].tolist()) == [0, 1, 2, 3, 4]
    later = SeededBatches(whole, 2, 3, 4, 6)
    assert torch.equal(torch.cat([later[i]["input_ids"] for i in range(6)]).flatten(), drawn[8:])
    assert [len(r["input_ids"]) for r in rows] == [2] * 10
    dealt = [SeededBatches(whole, 2, 3, 4, 6, rank, 2) for rank in (0, 1)]
    for index in range(6):
        mine = dealt[index % 2][index // 2]["input_ids"]
        assert torch.equal(mine, later[index]["input_ids"])


def test_the_rate_rises_then_falls_as_a_cosine():
    rule = AdamW(warmup=0.1, floor=0.2)
    rates = [rule.factor(step, 100) for step in range(101)]
    assert rates[:10] == sorted(rates[:10]) and rates[0] > 0 and rates[10] == 1
    assert rates[55] == pytest.approx(0.6) and rates[100] == pytest.approx(0.2)
    assert rates[77] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi * 67 / 90)) / 2)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_as_one(tmp_path, strategy):
    """Data-parallel, and in shards too, on the CPU, each process with half of every step's batches,
    over two legs. In double: in float32 Adam carries the rounding of any other order of summation,
    of one process's too, into the fifth digit within a few steps."""
    data, made, logs = batches("llama", rows=8), [], []
    for each, devices in ((4, 1), (2, 2)):
        task, folder = task_of().double(), tmp_path / str(devices)
        chosen = "auto" if devices == 1 else strategy
        trainer = Trainer(4, 2, each, every=2, strategy=chosen, devices=devices)
        parameters = {"weights": list(task.parameters())}
        course = TrainingSetup(
            task, task.loss, parameters, data[:1], AdamW(1e-3), data[1:], folder=folder
        )

        def work(
            task: Task = task, trainer: Trainer = trainer, course: TrainingSetup = course
        ) -> dict[str, Tensor]:
            trainer.fit(course)
            return weights(task)

        made.append(work() if devices == 1 else pairs.together(work))
        rows = (folder / "training.csv").read_text().splitlines()[1:]
        logs.append(torch.tensor([[float(value) for value in row.split(",")] for row in rows]))
    for name, tensor in made[0].items():
        torch.testing.assert_close(made[1][name], tensor, atol=1e-11, rtol=1e-9)
    torch.testing.assert_close(logs[1], logs[0])
    assert logs[0].shape == (2, 3) and not same(made[0], weights(task_of().double()))


def test_a_norm_beyond_float32_names_the_largest_gradient():
    task = task_of("llama")
    for parameter in task.parameters():
        parameter.grad = torch.ones_like(parameter)
    task.blocks[1].mlp.up_proj.weight.grad.fill_(1e30)
    said = str(divergence.diagnose_gradient(task, 3))
    assert "step 3" in said and "1e+30" in said and "layers.1.mlp.up_proj.weight" in said


def test_an_interrupt_stays_one(monkeypatch):
    def pressed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(losses.CrossEntropy, "__call__", pressed)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        METHOD(task_of(), lambda: batches("llama"))
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_what_one_process_meets_is_said_by_all(monkeypatch):
    """Of its own batch, in which it alone sees the layer that overflows."""
    plain = CrossEntropy.__call__

    def loss(self: CrossEntropy, task: Task, *rest: object) -> Tensor:
        return plain(self, task, *rest) * (math.nan if os.environ["LOCAL_RANK"] == "1" else 1.0)

    monkeypatch.setattr(losses.CrossEntropy, "__call__", loss)
    monkeypatch.setattr(
        divergence,
        "diagnose_loss",
        lambda *_: divergence.Diverged(f"seen by {os.environ['LOCAL_RANK']}"),
    )
    trainer = Trainer(2, 1, every=2, strategy="ddp", devices=2)
    method = replace(METHOD, weight=None, trainer=trainer)
    with pytest.raises(UserError, match=r"^seen by 1$"):
        pairs.together(lambda: method(task_of(), lambda: batches("llama")))
