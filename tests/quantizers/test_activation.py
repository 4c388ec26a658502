"""Activation and cache quantizers: what they see, when they round, what is left alone."""

import math
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from helpers.models import FAMILIES, joined, task_of

from qexp.common.errors import FieldError, UserError
from qexp.gradients import Soft, Straight
from qexp.grid import IntGrid, Range
from qexp.grid.ranges import MSE, Entropy, MinMax, MovingAverage, Percentile
from qexp.quantizers.activation import FakeQuant
from qexp.quantizers.fake_quantize import FakeQuantize
from qexp.quantizers.placement import AllOps, KVCache, LinearInputs, Placement, ProjectedKV
from qexp.quantizers.scheme import QuantizedActivations, all_called, quantize_activations

TENSOR = IntGrid(8, per_tensor=True)
TOKEN = IntGrid(8, symmetric=True)
FINE = IntGrid(16, per_tensor=True)


def losses(task, batch) -> torch.Tensor:
    with torch.no_grad():
        return task.loss(batch)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("placement", [LinearInputs(), AllOps(), KVCache()], ids=str)
def test_sixteen_bits_change_next_to_nothing_and_two_bits_do(family, placement):
    batch = joined(family)
    plain = losses(task_of(family), batch)
    fine, coarse = task_of(family), task_of(family)
    quantize_activations(fine, [QuantizedActivations(placement, FINE)], lambda: [batch])
    torch.testing.assert_close(losses(fine, batch), plain, atol=2e-3, rtol=1e-3)
    quantize_activations(
        coarse, [QuantizedActivations(placement, IntGrid(2, per_tensor=True))], lambda: [batch]
    )
    assert (losses(coarse, batch) - plain).abs() > 1e-6
    assert all(q.enabled and len(q.scale) == 1 for q in fine.quantizers.values())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_linears_that_share_an_input_share_a_quantizer(family):
    task = task_of(family)
    quantize_activations(
        task, [QuantizedActivations(LinearInputs(), TENSOR)], lambda: [joined(family)]
    )
    assert len(task.quantizers) == len(task.blocks) * len(task.arch.groups)


@torch.no_grad()
def test_linear_inputs_by_hand():
    task, batch = task_of("llama"), joined("llama")
    linear = task.blocks[0].mlp.down_proj
    seen: list[torch.Tensor] = []
    handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    task.loss(batch)
    handle.remove()
    quantize_activations(task, [QuantizedActivations(LinearInputs(), TENSOR)], lambda: [batch])
    quantizer = task.quantizers["model/layers/0/mlp/down_proj/input"]
    x = seen[0]
    q = TENSOR.fit(torch.stack([x.amin(), x.amax()])[None])
    torch.testing.assert_close(quantizer.scale, q.scale)
    torch.testing.assert_close(quantizer(x), TENSOR.round(x, q))
    torch.testing.assert_close(linear(x), TENSOR.round(x, q) @ linear.weight.T)


def test_dynamic_scales_are_each_tokens_own():
    quantizer = FakeQuant(TOKEN, dynamic=True)
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(quantizer(x), x)  # not settled yet
    quantizer.fix_range()
    torch.testing.assert_close(quantizer(x)[1, 3], TOKEN(x[1, 3][None])[0])


def outlying(outliers: float | None) -> FakeQuant:
    quantizer = FakeQuant(TOKEN, dynamic=True, outliers=outliers)
    quantizer.fix_range()
    return quantizer


def test_columns_with_outliers_stay_as_they_are():
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    x[1, 2, 3], x[0, 4, 7] = -7.0, 6.0  # one in either sequence: the batch decides
    y = outlying(6.0)(x)
    assert torch.equal(y[..., [3, 7]], x[..., [3, 7]])
    others = [column for column in range(16) if column not in (3, 7)]
    alone = TOKEN(x[..., others].reshape(10, 14)).reshape(2, 5, 14)
    torch.testing.assert_close(y[..., others], alone)  # scales do not see them
    scheme = QuantizedActivations(LinearInputs(), TOKEN, dynamic=True, outliers=6.0)
    assert torch.equal(scheme.rounded(x), y)


@pytest.mark.parametrize(("outliers", "same_as"), [(math.inf, None), (0.0, "float")])
def test_thresholds_of_infinity_and_zero(outliers: float, same_as: str | None):
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    expected = x if same_as == "float" else outlying(None)(x)
    assert torch.equal(outlying(outliers)(x), expected)
    assert not torch.equal(outlying(None)(x), x)


def test_gradients_pass_columns_with_outliers():
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    outlying(1.5)(x * 2).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 2.0))


def test_outliers_need_dynamic_scales():
    with pytest.raises(FieldError, match=r"outliers=6\.0 with dynamic=false: .*dynamic=true"):
        QuantizedActivations(LinearInputs(), TENSOR, outliers=6.0)
    with pytest.raises(FieldError, match=r"outliers=-1\.0: give a number, 0 or more"):
        QuantizedActivations(LinearInputs(), TOKEN, dynamic=True, outliers=-1.0)


@torch.no_grad()
def test_all_ops_rounds_the_residual_stream_itself():
    """The sum that the second norm reads is also the residual stream after it."""
    task, batch = task_of("llama"), joined("llama")
    quantize_activations(
        task, [QuantizedActivations(AllOps(), IntGrid(3, per_tensor=True))], lambda: [batch]
    )
    seen = {}
    task.blocks[0].post_attention_layernorm.register_forward_pre_hook(
        lambda _, args: seen.update(sum=args[0])
    )
    task.loss(batch)
    assert len(seen["sum"].unique()) <= 8


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_no_tensor_carries_two_quantizers(family):
    """What one made is what no other reads, so that training cannot part their ranges."""
    task, batch = task_of(family), joined(family)
    quantize_activations(task, [QuantizedActivations(AllOps(), TENSOR)], lambda: [batch])
    made: dict[str, torch.Tensor] = {}
    twice = []

    def hook(_, args, output, name):
        twice.extend((other, name) for other, y in made.items() if torch.equal(args[0], y))
        made[name] = output.clone()

    for name, quantizer in task.quantizers.items():
        quantizer.register_forward_hook(partial(hook, name=name))
    task.loss(batch)
    assert made and not twice


@torch.no_grad()
def test_cache_quantization_rounds_keys_and_values_per_head_and_token():
    task, batch = task_of("llama"), joined("llama")
    quantize_activations(
        task,
        [QuantizedActivations(KVCache(), IntGrid(2), dynamic=True)],
        lambda: pytest.fail("no data"),
    )
    seen = {}
    quantizer = task.quantizers["model/layers/1/attention/key"]
    quantizer.register_forward_hook(lambda _, args, out: seen.update(key=out))
    task.loss(batch)
    assert seen["key"].shape[1] == 2  # before key heads are repeated for the query heads
    assert all(len(vector.unique()) <= 4 for vector in seen["key"].flatten(0, 2))


@torch.no_grad()
def test_projected_keys_are_rounded_before_they_are_turned():
    """LLM-QAT: one scale for the key heads of a token, which the rotary embedding then mixes."""
    task, batch = task_of("llama"), joined("llama")
    grid = IntGrid(2, symmetric=True, narrow=True)
    quantize_activations(
        task,
        [QuantizedActivations(ProjectedKV(), grid, dynamic=True)],
        lambda: pytest.fail("no data"),
    )
    attention, seen = task.blocks[1].self_attn, {}
    for name, linear in (("key", attention.k_proj), ("value", attention.v_proj)):
        linear.register_forward_hook(lambda _, __, y, name=name: seen.update({name: y}))
    task.loss(batch)
    assert seen["key"].shape[-1] == 32  # two heads of 16
    for tensor in seen.values():
        assert all(len(token.abs().unique()) <= 2 for token in tensor.flatten(0, 1))
    assert {name.rpartition("/")[2] for name in task.quantizers} == {
        "projected_key",
        "projected_value",
    }
    with pytest.raises(UserError, match=r"^kv\.placement: .*kv=int8_token"):
        QuantizedActivations(ProjectedKV(), grid).put(task_of("gpt2"))


@pytest.mark.parametrize(
    ("estimator", "near"),
    # Values move to neighbouring bins, and with them the best of many like candidates.
    [(MinMax(), 1e-6), (Percentile(99.0), 1e-2), (MSE(norm=2.0), 1e-2), (Entropy(), 0.1)],
    ids=str,
)
def test_streamed_ranges_are_those_of_all_values_at_once(estimator, near):
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(4, 256, generator=generator) * size for size in (1, 3, 0.5)]
    grid = IntGrid(8, per_tensor=True, range=estimator)
    stream = estimator.observer()
    for part in parts:
        stream.add(part)
    streamed, whole = grid.fit(*stream.values()), grid.fit(torch.cat(parts))
    torch.testing.assert_close(streamed.scale, whole.scale, rtol=near, atol=0)


def test_a_moving_average_follows_the_stream():
    stream = MovingAverage(momentum=0.75).observer()
    for end in (4.0, 8.0, 0.0):
        stream.add(torch.tensor([-end, end / 2]))
    low = -(0.75 * (0.75 * 4 + 0.25 * 8) + 0.25 * 0)
    expected = TENSOR.scale_for(torch.tensor([[low]]), torch.tensor([[-low / 2]]))
    torch.testing.assert_close(TENSOR.fit(*stream.values()).scale, expected.scale)


@pytest.mark.parametrize("estimator", [MinMax(), MovingAverage(), Percentile(), Entropy()], ids=str)
def test_values_that_are_not_finite_are_refused(estimator):
    with pytest.raises(UserError, match="not finite"):
        estimator.observer().add(torch.tensor([1.0, torch.nan]))
    with pytest.raises(UserError, match="never reached"):
        estimator.observer().values()


def clip(x: torch.Tensor, estimator: Range, bits: int = 8) -> tuple[float, float]:
    low, high = estimator(x[None], IntGrid(bits, per_tensor=True))
    return float(low), float(high)


def test_entropy_clips_what_is_rare_and_keeps_what_is_not():
    generator = torch.Generator().manual_seed(0)
    normal, flat = (make(20000, generator=generator) for make in (torch.randn, torch.rand))
    low, high = clip(torch.cat([normal, torch.tensor([400.0])]), Entropy())
    assert low == float(normal.min()) and high < 100
    assert clip(flat, Entropy()) == clip(flat, MinMax())
    assert clip(torch.ones(5), Entropy()) == (1.0, 1.0)


def test_entropy_is_the_least_divergence_by_hand():
    """The published loop on magnitudes: 32 bins onto 4 levels."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(500, generator=generator).abs().double()
    high, low = float(x.max()), float(x.min())
    width = (high - low) / 32
    mass = torch.histc(x, 32, low, high).tolist()
    grid = IntGrid(2, per_tensor=True)
    found = {}
    for bins in range(32, 4, -1):
        end = high - (32 - bins) * width
        q = grid.scale_for(torch.tensor([[low]]), torch.tensor([[end]]))
        kept = [i for i in range(32) if low + (i + 0.5) * width <= end]
        p = [mass[i] for i in kept]
        p[-1] += sum(mass[len(kept) :])
        level = [int(grid.encode(torch.full((1, 1), low + (i + 0.5) * width), q)) for i in kept]
        share = [
            sum(mass[j] for j in kept if level[j] == level[i])
            / sum(mass[j] > 0 for j in kept if level[j] == level[i])
            if mass[i]
            else 1e-4
            for i in kept
        ]
        divergence = 0.0
        for a, b in zip(p, share, strict=True):
            if a:
                divergence += a / sum(p) * math.log(a / sum(p) / (b / sum(share)))
        found[end] = divergence
    best = min(found, key=found.__getitem__)
    assert best < high
    assert clip(x.float(), Entropy(32, 1), bits=2)[1] == pytest.approx(best, rel=1e-5)


def test_a_soft_forward_of_dynamic_scales_is_evaluated_hard():
    quantizer = FakeQuant(IntGrid(3, symmetric=True, range=MSE()), dynamic=True)
    quantizer.fix_range()
    quantizer.make_trainable(FakeQuantize(Straight(), Soft("silu", forward="soft")), offset=False)
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    soft, hard = quantizer.train()(x), quantizer.eval()(x)
    quantizer.make_constant()
    assert torch.equal(hard, quantizer(x)) and not torch.equal(soft, hard)


@dataclass(frozen=True)
class Scores(Placement):
    """Attention's scores and probabilities alone."""

    operands = ("scores", "probabilities")

    def sites(self, task):
        return []


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(
    "placements",
    [(LinearInputs(), KVCache()), (Scores(), KVCache()), (KVCache(), Scores())],
    ids=str,
)
def test_placements_on_disjoint_sites_all_round(placements, dynamic):
    task, batch = task_of("llama"), joined("llama")
    kinds = [QuantizedActivations(each, TENSOR, dynamic) for each in placements]
    quantize_activations(task, kinds, lambda: [batch])
    assert list(task.quantizers) == [
        name.replace(".", "/") for kind in kinds for name in kind.sites(task)
    ]
    with all_called(task, "this forward"):
        task.loss(batch)
    apart = []
    for each in placements:  # what each rounds alone
        alone = task_of("llama")
        quantize_activations(alone, [QuantizedActivations(each, TENSOR, dynamic)], lambda: [batch])
        apart.append(losses(alone, batch))
    assert all(losses(task, batch) != loss for loss in apart)


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("order", [1, -1])
def test_two_quantizers_of_one_tensor_are_refused_before_any_is_put(dynamic, order):
    task, batch = task_of("llama"), joined("llama")
    plain = losses(task, batch)
    kinds = [QuantizedActivations(each, TENSOR, dynamic) for each in (AllOps(), KVCache())][::order]
    sentence = r"^activation, kv: model\.layers\.0\.attention\.key would carry two .*kv=none"
    with pytest.raises(UserError, match=sentence):
        quantize_activations(task, kinds, lambda: [batch])
    assert not task.quantizers and losses(task, batch) == plain
    quantize_activations(task, kinds[:1], lambda: [batch])
    with pytest.raises(UserError, match="would carry two quantizers"):
        quantize_activations(task, kinds[1:], lambda: [batch])


def test_a_quantizer_that_nothing_calls_is_an_error_with_its_name(monkeypatch):
    batch = joined("llama")
    monkeypatch.setattr("qexp.quantizers.operands.install", lambda *_: None)
    kinds = [QuantizedActivations(LinearInputs(), TENSOR), QuantizedActivations(KVCache(), TENSOR)]
    silent = r"calibration never called .* of model\.layers\.0\.attention\.key \(6 of 18 are silent"
    with pytest.raises(UserError, match=silent):
        quantize_activations(task_of("llama"), kinds, lambda: [batch])
    task = task_of("llama")
    dynamic = [QuantizedActivations(KVCache(), TOKEN, dynamic=True)]
    quantize_activations(task, dynamic, lambda: pytest.fail("no data"))
    with (
        pytest.raises(UserError, match=r"eval\.x never called .*model\.layers\.0\.attention\.key"),
        all_called(task, "eval.x"),
    ):
        losses(task, batch)


def test_static_ranges_without_sequences_are_refused():
    kinds = [QuantizedActivations(LinearInputs(), TENSOR)]
    with pytest.raises(UserError, match=r"^calibration: there are no sequences.*calibration=first"):
        quantize_activations(task_of("llama"), kinds, list)
