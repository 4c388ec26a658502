"""QuantTune: the penalty against its formula and autograd, its control, and whole runs."""

import csv
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import pairs
from helpers.models import batches, task_of
from helpers.pipeline import run
from helpers.training import METHOD, SMOKE, same, weights
from hydra import compose

from qexp.common.errors import FieldError, UserError
from qexp.config.instantiate import instantiate
from qexp.methods.finetune import FineTune
from qexp.quantizers.placement import AllOps, LinearInputs
from qexp.quantizers.scheme import quantize_activations
from qexp.quantizers.site_input import SiteInput
from qexp.task import Task
from qexp.training.penalties import Deviation, Form, NoPenalty, Outliers, Span, Watching
from qexp.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("configured")


FORM = Deviation(k=2.0)
PENALTY = Outliers(FORM, LinearInputs())
FLOAT = replace(METHOD, weight=None, trainer=replace(SMOKE, steps=8, every=4))


def by_formula(x: torch.Tensor, form: Form) -> torch.Tensor:
    """The same, dense, for autograd."""
    mean, deviation = x.detach().mean(), x.detach().std(correction=0)
    unit = deviation if form.normalized else 1.0
    if isinstance(form, Span):
        excess = (x.max() - x.min() - 2 * form.k * deviation).clamp(min=0)
        return (excess / unit) ** form.power
    deviations = ((x - mean).abs() - form.k * deviation).clamp(min=0)
    count = max(int((deviations > 0).sum()), 1)
    return ((deviations / unit) ** form.power).sum() / count


def losses_and_gradients(task: Task, penalty: Outliers, batch: dict) -> tuple[torch.Tensor, dict]:
    with penalty.watch(task) as watch:
        loss = task.loss(batch)
        value = watch.take(loss)
    task.zero_grad()
    value.backward()
    return value.detach(), {n: p.grad for n, p in task.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "form",
    [
        Deviation(2.0),
        Deviation(2.0, power=1),
        Deviation(1.5, normalized=False),
        Deviation(100.0),
        Span(2.0, power=1),
        Span(2.0),
    ],
    ids=str,
)
def test_value_and_gradient_are_those_of_the_formula(form):
    task, [batch] = task_of("opt"), batches("opt", count=1)
    penalty = replace(PENALTY, form=form, share=None, weight=0.5)
    value, gradients = losses_and_gradients(task, penalty, batch)
    seen: list[torch.Tensor] = []
    handles = [site.watch(seen.append) for site in LinearInputs().sites(task)]
    task.loss(batch)
    for handle in handles:
        handle.remove()
    assert len(seen) == 12
    expected = 0.5 * torch.stack([by_formula(x, form) for x in seen]).mean()
    torch.testing.assert_close(value, expected.detach())
    assert (value > 0) == (form.k < 100)
    task.zero_grad()
    expected.backward()
    for name, gradient in gradients.items():
        there = dict(task.named_parameters())[name].grad
        torch.testing.assert_close(gradient, torch.zeros_like(gradient) if there is None else there)


def test_a_share_of_the_first_loss_sets_the_weight():
    task, [one, other] = task_of(), batches("llama")
    with PENALTY.watch(task) as watch:
        first = task.loss(one)
        assert watch.take(first).item() == pytest.approx(0.1 * first.item(), rel=1e-5)
        weight = watch.notes["weight"]
        watch.take(task.loss(other))
        assert watch.notes["weight"] == weight
        with torch.no_grad():  # validation compares losses
            assert watch.take(task.loss(other)) == 0


def test_the_running_statistics():
    task, parts = task_of(), batches("llama")
    seen: list[torch.Tensor] = []
    with replace(PENALTY, momentum=0.75).watch(task) as watch:
        site = LinearInputs().sites(task)[3]
        handle = site.watch(seen.append)
        for batch in parts:
            watch.take(task.loss(batch))
        handle.remove()
    means = [x.mean() for x in seen]
    mean, deviation = watch.notes["statistics"][site.name]
    torch.testing.assert_close(mean, 0.75 * means[0] + 0.25 * means[1], rtol=1e-3, atol=1e-6)
    spreads = [x.std(correction=0) for x in seen]
    torch.testing.assert_close(deviation, 0.75 * spreads[0] + 0.25 * spreads[1])


def watching(task) -> int:
    """Hooks and watchers; the hook of a site's input stays where nothing watches it any more."""
    count = 0
    for module in task.modules():
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        sites = [site for h in hooks if isinstance(site := getattr(h, "__self__", None), SiteInput)]
        count += len(hooks) - len(sites) + sum(len(site.watchers) for site in sites)
    return count


def test_which_tensors_are_watched():
    task, [batch] = task_of("bert"), batches("bert", count=1)
    hooks = watching(task)
    chosen = replace(PENALTY, sites=["*.output.dense.input", "*LayerNorm.output"])
    with replace(chosen, placement=AllOps()).watch(task) as watch:
        watch.take(task.loss(batch))
        assert len(watch.notes["kept"]) == 3 * 2 + 3 * 2
    with replace(PENALTY, worst=0.3).watch(task) as watch:
        watch.take(task.loss(batch))
        assert len(watch.notes["kept"]) == 4  # of twelve, rounded up
        assert watch.take(task.loss(batch)) > 0
    assert hooks == watching(task)
    with (
        pytest.raises(UserError, match="matches no tensor"),
        replace(chosen, sites=["x"]).watch(task),
    ):
        pass
    for wrong in ({"share": None}, {"weight": 1.0}, {"share": -1.0}, {"worst": 0.0}):
        with pytest.raises(FieldError, match=r"give"):
            replace(PENALTY, **wrong)


def trained(method: FineTune, folder: Path | None = None, family: str = "llama") -> dict:
    task = task_of(family, folder)
    assert method(task, lambda: batches(family)) == []
    return weights(task)


def test_no_weight_is_no_penalty_bit_for_bit():
    plain = trained(replace(FLOAT, penalty=NoPenalty()))
    assert same(plain, trained(replace(FLOAT, penalty=None)))
    assert same(plain, trained(replace(FLOAT, penalty=replace(PENALTY, share=0))))
    assert not same(plain, trained(replace(FLOAT, penalty=PENALTY)))


def test_recomputed_activations_change_no_weight():
    method = replace(FLOAT, penalty=replace(PENALTY, momentum=0.5))
    there = replace(method, trainer=replace(method.trainer, recompute=True))
    one, other = trained(method), trained(there)
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, rtol=1e-5, atol=1e-6)


def test_it_joins_training_with_quantizers():
    task = task_of()
    penalty = replace(PENALTY, share=1.0)
    method = replace(METHOD, penalty=penalty, trainer=replace(SMOKE, steps=2))
    assert len(method(task, lambda: batches("llama"))) == len(task.linears())


SMALL = (
    "data=synthetic",
    "calibration.sequences=8",
    "calibration.length=32",
    "weight=channel",
    "weight.bits=8",
    "activation=int8_tensor",
    "trainer=smoke",
    "progress=false",
    "method=quanttune",
    "method.training.optimizer.weights=1e-3",
)


def test_a_run_trains_once_for_all_calibrators_and_reloads(tmp_path, monkeypatch):
    monkeypatch.setenv("QEXP_CACHE_DIR", str(tmp_path / "cache"))
    model = ("model=tiny_vit", "eval=accuracy")
    one = run(tmp_path / "one", *model, small=SMALL)
    assert (tmp_path / "one" / "training.csv").exists() and one["weight/count"] > 0
    for name in ("entropy", "percentile_9999", "moving_average"):
        grid = (f"activation/grid/range={name}", "activation.grid.bits=3")
        other = run(tmp_path / name, *model, *grid, small=SMALL)
        assert not (tmp_path / name / "training.csv").exists() and other["synthetic_test/acc"] >= 0
    run(tmp_path / "control", *model, "method.training.penalty.share=0", small=SMALL)
    assert (tmp_path / "control" / "training.csv").exists()
    again = run(
        tmp_path / "again", "model=from_run", f"run={tmp_path / 'one'}", small=["progress=false"]
    )
    assert again["synthetic_test/acc"] == one["synthetic_test/acc"]


def test_ranges_are_those_of_the_tuned_model(tmp_path, monkeypatch):
    monkeypatch.setenv("QEXP_CACHE_DIR", str(tmp_path / "cache"))
    cfg = compose("config", [*SMALL, "model=tiny_llama", "method@method.quantization=none"])
    method, data, task = instantiate(cfg.method), batches("llama"), task_of()
    assert method(task, lambda: data) == []
    tuned = task_of()
    tuned.model.load_state_dict(task.model.state_dict())
    quantize_activations(tuned, method.activations, lambda: data)
    assert task.quantizers.keys() == tuned.quantizers.keys()
    for name, quantizer in task.quantizers.items():
        assert torch.equal(quantizer.scale, tuned.quantizers[name].scale)
    assert not same(weights(task), weights(task_of()))


def test_the_penalty_narrows_what_it_watches(tmp_path):
    """Against its control, on a model with a channel of outliers."""

    def spread(penalty: Outliers) -> float:
        task, data = task_of("opt"), batches("opt", count=4)
        with torch.no_grad():
            for block in task.blocks:
                block.fc1.weight[3] *= 30
        trainer = replace(SMOKE, steps=24, every=8)
        replace(FLOAT, penalty=penalty, trainer=trainer)(task, lambda: data)
        seen: list[torch.Tensor] = []
        sites = [s for s in LinearInputs().sites(task) if s.name.endswith("fc2.input")]
        handles = [site.watch(lambda x: seen.append(x.detach())) for site in sites]
        with torch.no_grad():
            task.loss(data[0])
        for handle in handles:
            handle.remove()
        return sum(float((x.max() - x.min()) / x.std()) for x in seen)

    assert spread(replace(PENALTY, share=10.0)) < 0.9 * spread(replace(PENALTY, share=0))


def test_a_killed_training_remembers_its_penalty(tmp_path):
    class Killed(Exception):
        pass

    method = replace(FLOAT, penalty=PENALTY)
    whole = trained(method, tmp_path / "whole")

    class Breaking(type(method.loss)):
        count = 0

        def __call__(self, *arguments):
            type(self).count += torch.is_grad_enabled()
            if type(self).count == 7:
                raise Killed
            return super().__call__(*arguments)

        def __repr__(self) -> str:
            return "CrossEntropy()"

    with pytest.raises(Killed):
        trained(replace(method, loss=Breaking()), tmp_path / "half")
    assert same(whole, trained(method, tmp_path / "half"))
    with (tmp_path / "half" / "training.csv").open() as file:
        assert [line["step"] for line in csv.DictReader(file)] == ["4.0", "8.0"]


@pytest.mark.slow
def test_a_penalty_is_the_same_in_all_processes(tmp_path, monkeypatch):
    """λ, the running statistics and the tensors that are penalized, though each has batches of its
    own: a checkpoint keeps those of one process."""
    plain = Watching.take

    def noting(self: Watching, loss: torch.Tensor) -> torch.Tensor:
        value = plain(self, loss)
        name = f"{os.environ['LOCAL_RANK']}-{len(list(tmp_path.iterdir()))}"
        torch.save(self.memory, tmp_path / name)
        return value

    monkeypatch.setattr(Watching, "take", noting)
    trainer = Trainer(2, 1, every=2, strategy="ddp", devices=2)
    penalty = replace(PENALTY, worst=0.5)
    method = replace(METHOD, weight=None, penalty=penalty, trainer=trainer)
    pairs.together(lambda: method(task_of(), lambda: batches("llama", rows=4)))
    notes = [
        [torch.load(path) for path in sorted(tmp_path.glob(f"{rank}-*"), key=os.path.getmtime)]
        for rank in (0, 1)
    ]
    steps = min(map(len, notes))  # the second is ended with the first
    assert steps >= 2 and notes[0][0]["weight"] > 0
    for one, two in zip(notes[0][:steps], notes[1][:steps], strict=True):
        assert (one["weight"], one["kept"]) == (two["weight"], two["kept"])
        assert one["statistics"].keys() == two["statistics"].keys()
        for name, pair in one["statistics"].items():
            assert all(map(torch.equal, pair, two["statistics"][name]))
