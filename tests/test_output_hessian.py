"""Hessians from gradients of the output, against autograd's own weight gradients."""

import pytest
import torch
from conftest import batches
from test_walk import joined, task_of

from qexp.errors import UserError
from qexp.grid import IntGrid
from qexp.hessian import Layerwise, second_moment
from qexp.hessian import output as output_hessian
from qexp.hessian.output import OutputAdaptive, TokenWeighted, through_tokens
from qexp.methods.blockwise import Blockwise
from qexp.solvers import GPTQ
from qexp.walk import walk

GRID = IntGrid(3, group_size=32)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QEXP_CACHE_DIR", str(tmp_path / "cache"))


def gradients(family: str) -> dict[str, list[torch.Tensor]]:
    """Each linear's weight gradient on each sequence, by autograd."""
    task = task_of(family).requires_grad_(True)
    found: dict[str, list[torch.Tensor]] = {name: [] for name in task.linears()}
    batch = joined(family)
    for n in range(len(next(iter(batch.values())))):
        task.zero_grad()
        task.loss({key: value[n : n + 1] for key, value in batch.items()}).backward()
        for name, linear in task.linears().items():
            found[name].append(linear.weight.grad.clone())
    return found


def contribution(source, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    a, b = source.factors(x, g)
    return a.T @ b


def measured(task, source, data) -> dict[str, torch.Tensor]:
    return {
        f"{block.name}.{name}": hessian
        for block in walk(task, data)
        for name, hessian in source(block).items()
    }


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "gpt_neox", "gemma3", "bert", "vit"])
@pytest.mark.parametrize("schedule", ["per_block", "every_k", "one_pass"])
def test_oac_is_the_sum_of_each_sequences_gram_matrix(family, schedule):
    source = OutputAdaptive(schedule=schedule, k=2, sequences=1, loss_scale=64.0)
    hessians = measured(task_of(family), source, batches(family))
    for name, each in gradients(family).items():
        expected = 64.0**2 * sum(g.T @ g for g in each)
        torch.testing.assert_close(hessians[name], expected, rtol=1e-3, atol=1e-5 * expected.max())
        summed = sum(each)  # the mistake: one gradient of the whole batch
        assert not torch.allclose(hessians[name], 64.0**2 * summed.T @ summed, rtol=0.05)


def test_sequences_at_a_time_change_nothing():
    results = [
        measured(task_of("opt"), OutputAdaptive(sequences=n), [joined("opt")]) for n in (1, 2, 4)
    ]
    for other in results[1:]:
        for name, hessian in results[0].items():
            scale = hessian.abs().max()
            torch.testing.assert_close(hessian / scale, other[name] / scale, rtol=1e-3, atol=1e-5)


def test_both_orders_of_multiplication_agree():
    x, g = torch.randn(7, 12), torch.randn(7, 9)
    expected = (g.T @ x).T @ (g.T @ x)
    torch.testing.assert_close(contribution(OutputAdaptive(), x, g), expected)
    assert through_tokens(64, 4096, 4096) and not through_tokens(4096, 64, 64)
    wide = torch.randn(64, 300)
    torch.testing.assert_close(
        contribution(OutputAdaptive(), x[:1].expand(64, 12), wide),
        (wide.T @ x[:1].expand(64, 12)).T @ (wide.T @ x[:1].expand(64, 12)),
        rtol=1e-3,
        atol=1e-3,
    )


def test_one_token_and_unit_gradients_give_the_activation_hessian():
    x = torch.randn(5, 1, 16)  # five sequences of one token
    unit = torch.ones(1, 1)
    for source in (OutputAdaptive(), TokenWeighted()):
        total = sum(contribution(source, sequence, unit) for sequence in x)
        torch.testing.assert_close(total, second_moment([x]) * 5 / 2)


def test_token_weighted_drops_the_terms_between_tokens():
    x, g = torch.randn(6, 8), torch.randn(6, 5)
    expected = sum(g[t].square().sum() * torch.outer(x[t], x[t]) for t in range(6))
    torch.testing.assert_close(contribution(TokenWeighted(), x, g), expected)


def test_the_scale_of_a_hessian_is_free():
    task, other = task_of("llama"), task_of("llama")
    for each, scale in ((task, 1.0), (other, 1000.0)):
        Blockwise(GPTQ(GRID), OutputAdaptive(loss_scale=scale))(each, lambda: [joined("llama")])
    for a, b in zip(task.linears().values(), other.linears().values(), strict=True):
        assert torch.isclose(a.weight, b.weight, atol=1e-4).float().mean() > 0.98


def test_per_block_sees_the_blocks_before_quantized_and_one_pass_does_not():
    def hessians(schedule: str) -> list[torch.Tensor]:
        seen = []
        for block in walk(task := task_of("llama"), [joined("llama")]):
            found = []
            OutputAdaptive(schedule=schedule).each(block, lambda names, h, f=found: f.append(h))
            seen.append(found[0])
            for linear in block.linears.values():
                linear.weight.data = GRID(linear.weight.data)
        assert not any(parameter.grad is not None for parameter in task.parameters())
        return seen

    per_block, one_pass = hessians("per_block"), hessians("one_pass")
    torch.testing.assert_close(per_block[0], one_pass[0])
    assert not torch.allclose(per_block[2], one_pass[2], rtol=0.05)


@pytest.mark.parametrize("memory", [8.0, 1e-9])
def test_one_pass_is_measured_once_and_shared(monkeypatch, memory):
    source = OutputAdaptive(schedule="one_pass", memory=memory)
    first = measured(task_of("llama"), source, [joined("llama")])
    monkeypatch.setattr(
        output_hessian.FromGradients, "_measure", lambda *_: pytest.fail("measured again")
    )
    again = measured(task_of("llama"), source, [joined("llama")])
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    with pytest.raises(BaseException, match="measured again"):  # other data, other Hessians
        measured(task_of("llama"), source, [{"input_ids": joined("llama")["input_ids"] + 1}])


def test_sampled_labels_are_the_models_own_and_seeded():
    def hessian(seed: int) -> torch.Tensor:
        source = OutputAdaptive(labels="sampled", seed=seed)
        return measured(task_of("llama"), source, [joined("llama")])["model.layers.0.mlp.up_proj"]

    assert torch.equal(hessian(0), hessian(0))
    assert not torch.allclose(hessian(0), hessian(1))
    with pytest.raises(UserError, match="sampled"):
        measured(task_of("vit"), OutputAdaptive(labels="sampled"), [joined("vit")])


def test_half_precision_is_close_and_underflow_is_an_error():
    exact = measured(task_of("llama"), OutputAdaptive(), [joined("llama")])
    half = measured(task_of("llama"), OutputAdaptive(dtype="bfloat16"), [joined("llama")])
    for name, hessian in exact.items():
        assert (half[name] - hessian).norm() < 0.1 * hessian.norm()
    with pytest.raises(UserError, match="underflowed"):
        measured(task_of("llama"), OutputAdaptive(loss_scale=1e-30), [joined("llama")])


@pytest.mark.parametrize("fields", [{"schedule": "never"}, {"dtype": "int8"}, {"labels": "all"}])
def test_unknown_choices_are_refused(fields):
    with pytest.raises(UserError, match=f"method.hessian.{next(iter(fields))}"):
        OutputAdaptive(**fields)


@pytest.mark.parametrize("source", [Layerwise(), OutputAdaptive(schedule="every_k", k=2)], ids=str)
def test_a_killed_run_goes_on_where_it_was(monkeypatch, source):
    method = Blockwise(GPTQ(GRID), source)
    whole = task_of("llama")
    records = method(whole, lambda: [joined("llama")])
    solved: list[str] = []
    original = Blockwise._solve

    def until(stop: int):
        def solve(self, block):
            if block.index == stop:
                raise KeyboardInterrupt
            solved.append(block.name)
            return original(self, block)

        return solve

    monkeypatch.setattr(Blockwise, "_solve", until(2))
    with pytest.raises(KeyboardInterrupt):
        method(task_of("llama"), lambda: [joined("llama")])
    solved.clear()
    monkeypatch.setattr(Blockwise, "_solve", until(99))
    resumed = task_of("llama")
    again = method(resumed, lambda: [joined("llama")])
    assert solved == ["model.layers.2"]
    assert [r.error for r in again] == [r.error for r in records]
    torch.testing.assert_close(
        dict(resumed.named_parameters()), dict(whole.named_parameters()), rtol=0, atol=0
    )
