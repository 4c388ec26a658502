"""Hessians from gradients of the output, against autograd's own weight gradients."""

import pytest
import torch
from helpers.hessians import GRID, measured
from helpers.models import batches, joined, task_of

from qexp.common.errors import UserError
from qexp.hessian import BothSides, Diagonal, Layerwise, OutputAdaptive, TokenWeighted
from qexp.hessian.from_gradients import BetweenTokens
from qexp.hessian.gradient_hooks import check_dead
from qexp.hessian.output import through_tokens
from qexp.methods.blockwise import Blockwise
from qexp.solvers import GPTQ, TwoSided
from qexp.solvers.both_sides import sides

pytestmark = pytest.mark.usefixtures("own_cache")


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
    [(a, b)] = source.factors(x, g)
    return a.T @ b


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


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("schedule", ["per_block", "one_pass"])
def test_the_diagonal_is_the_sum_of_each_sequences_squares(family, schedule):
    source = Diagonal(schedule=schedule, sequences=2, loss_scale=64.0)
    hessians = measured(task_of(family), source, [joined(family)])
    for name, each in gradients(family).items():
        expected = 64.0**2 * sum(g.square() for g in each)
        torch.testing.assert_close(hessians[name], expected, rtol=1e-3, atol=1e-5 * expected.max())


def test_an_underflow_of_the_diagonal_is_an_error():
    with pytest.raises(UserError, match="underflowed"):
        measured(task_of("llama"), Diagonal(loss_scale=1e-30), [joined("llama")])


def test_sequences_at_a_time_change_nothing():
    results = [
        measured(task_of("opt"), OutputAdaptive(sequences=n), [joined("opt")]) for n in (1, 2, 4)
    ]
    for other in results[1:]:
        for name, hessian in results[0].items():
            scale = hessian.abs().max()
            torch.testing.assert_close(hessian / scale, other[name] / scale, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("tokens", "rows", "columns"), [(7, 9, 12), (4, 40, 30)])
def test_both_orders_of_multiplication_agree(tokens, rows, columns):
    x, g = torch.randn(tokens, columns), torch.randn(tokens, rows)
    assert through_tokens(tokens, rows, columns) == (tokens == 4)
    gradient = g.T @ x
    torch.testing.assert_close(
        contribution(OutputAdaptive(), x, g), gradient.T @ gradient, rtol=1e-3, atol=1e-4
    )


def test_the_order_with_fewer_multiplications_is_taken():
    assert through_tokens(64, 4096, 4096) and not through_tokens(4096, 64, 64)


@pytest.mark.parametrize("tokens", [1, 5])
def test_unit_gradients_give_the_activation_hessian_where_sequences_have_one_token(tokens):
    task, last = task_of("llama"), "model.layers.2"
    outputs = []
    task.blocks[2].register_forward_hook(lambda _, __, out: outputs.append(out))

    def loss(batch: dict) -> torch.Tensor:
        """Its gradient at each token's output of the last block is one unit vector."""
        task.encode(batch)
        return outputs[-1][..., 0].sum() / len(batch["input_ids"])

    task.loss = loss
    data = [{"input_ids": joined("llama")["input_ids"][:, :tokens]}]
    count = data[0]["input_ids"].numel()
    activation = measured(task, Layerwise(), data)[f"{last}.mlp.down_proj"]
    output, token = (
        measured(task, source(loss_scale=16.0), data)[f"{last}.mlp.down_proj"] / 16**2 * 2 / count
        for source in (OutputAdaptive, TokenWeighted)
    )
    torch.testing.assert_close(token, activation)
    if tokens == 1:
        torch.testing.assert_close(output, activation)
    else:
        assert (output - activation).norm() > 0.1 * activation.norm()


def test_token_weighted_drops_the_terms_between_tokens():
    x, g = torch.randn(6, 8), torch.randn(6, 5)
    expected = sum(g[t].square().sum() * torch.outer(x[t], x[t]) for t in range(6))
    torch.testing.assert_close(contribution(TokenWeighted(), x, g), expected)


@pytest.mark.parametrize("family", ["llama", "opt", "bert"])
@pytest.mark.parametrize("schedule", ["per_block", "every_k", "one_pass"])
def test_the_terms_between_tokens_are_compared_with_the_others(family, schedule, monkeypatch):
    """In units of the trace that is left without them, once a walk; not where one token has the
    loss of all."""
    seen = []
    monkeypatch.setattr(BetweenTokens, "warn", lambda self: seen.append(self.ratios))
    both = [
        measured(task_of(family), kind(schedule=schedule, k=2), batches(family))
        for kind in (OutputAdaptive, TokenWeighted)
    ]
    ratios, none = seen
    assert none == []
    expected = [float(both[0][name].trace() / both[1][name].trace()) for name in both[0]]
    causal = family != "bert"
    assert sorted(ratios) == (pytest.approx(sorted(expected), rel=1e-3) if causal else [])


def test_labels_of_the_model_are_not_compared(monkeypatch):
    """The warning would name what is chosen already."""
    seen = []
    monkeypatch.setattr(BetweenTokens, "warn", lambda self: seen.append(self.ratios))
    measured(task_of("llama"), OutputAdaptive(labels="sampled"), batches("llama"))
    assert seen == [[]]


def test_correlated_gradients_are_said(caplog):
    BetweenTokens([1.0, 1.9, 2.2, 0.0]).warn()
    BetweenTokens([]).warn()
    assert not caplog.records
    BetweenTokens([1.0, 2.5, 9.0]).warn()
    [record] = caplog.records
    assert "trace is 2.82 times the token-weighted" in record.getMessage()


def test_the_scale_of_a_hessian_is_free():
    task, other = task_of("llama"), task_of("llama")
    for each, scale in ((task, 1.0), (other, 1000.0)):
        Blockwise(GPTQ(GRID), OutputAdaptive(loss_scale=scale))(each, lambda: [joined("llama")])
    for a, b in zip(task.linears().values(), other.linears().values(), strict=True):
        assert torch.isclose(a.weight, b.weight, atol=1e-4).float().mean() > 0.98


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


@pytest.mark.parametrize("source", [OutputAdaptive(), TokenWeighted(schedule="one_pass")], ids=str)
def test_dead_columns_are_those_of_the_activation_hessian(source):
    def damaged():
        task = task_of("llama")
        task.blocks[1].input_layernorm.weight.data[[3, 7]] = 0
        return task

    data = [joined("llama")]
    ours, theirs = measured(damaged(), source, data), measured(damaged(), Layerwise(), data)
    for name, hessian in theirs.items():
        dead = (hessian.diagonal() == 0).nonzero().flatten().tolist()
        assert (ours[name].diagonal() == 0).nonzero().flatten().tolist() == dead
        assert dead == (
            [3, 7] if name.startswith("model.layers.1.self_attn.") and "o_" not in name else []
        )


def test_only_what_no_token_uses_is_dead():
    seen, scored = torch.tensor([1, 1, 1, 0]).bool(), torch.tensor([1, 1, 0, 0]).bool()
    hessian = torch.diag(torch.tensor([3.0, 2.0, 0.0, 0.0]))
    check_dead("a", hessian.diagonal(), seen, scored)  # the third input: in last tokens alone
    assert hessian.diagonal().tolist() == [3.0, 2.0, 2.0, 0.0]
    with pytest.raises(UserError, match="a: 1 inputs with data have no gradient"):
        check_dead("a", torch.tensor([3.0, 0.0, 0.0, 0.0]), seen, scored)


@pytest.mark.parametrize("source", [OutputAdaptive, TokenWeighted])
def test_groups_of_rows_have_the_hessians_of_their_own_gradients(source):
    whole, split = (
        measured(task_of("llama"), source(loss_scale=64.0, groups=groups), [joined("llama")])
        for groups in (1, 4)
    )
    for name, hessian in whole.items():
        assert split[name].shape == (4, *hessian.shape)
        torch.testing.assert_close(
            split[name].sum(0), hessian, rtol=1e-3, atol=1e-5 * hessian.max()
        )
    x, g = torch.randn(6, 8), torch.randn(6, 12)
    for number, (a, b) in enumerate(source(groups=4).factors(x, g)):
        part = contribution(source(), x, g[:, 3 * number : 3 * number + 3])
        assert torch.equal(a.T @ b, part)


def test_both_sides_are_the_gram_matrices_of_each_sequences_gradient():
    source = BothSides(sequences=2, loss_scale=64.0, labels="data")
    hessians = measured(task_of("llama"), source, [joined("llama")])
    for name, each in gradients("llama").items():
        inputs, outputs = sides(hessians[name], each[0].shape[1])
        for ours, expected in (
            (inputs, 64.0**2 * sum(g.T @ g for g in each)),
            (outputs, 64.0**2 * sum(g @ g.T for g in each)),
        ):
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5 * expected.max())


def test_a_solver_and_a_hessian_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="BothSides has a Hessian of the outputs, which GPTQ"):
        Blockwise(GPTQ(GRID), BothSides())
    for source in (Layerwise(), OutputAdaptive(), TokenWeighted(groups=2)):
        with pytest.raises(UserError, match="TwoSided needs a Hessian of the outputs too"):
            Blockwise(TwoSided(GRID), source)
    with pytest.raises(UserError, match="groups=3 does not divide the 64 outputs"):
        Blockwise(GPTQ(GRID), TokenWeighted(groups=3))(task_of("llama"), lambda: [joined("llama")])


@pytest.mark.parametrize(
    "method",
    [
        Blockwise(GPTQ(GRID), TokenWeighted(groups=2)),
        Blockwise(TwoSided(GRID), BothSides(labels="sampled", schedule="one_pass")),
    ],
    ids=["groups", "both"],
)
def test_layers_are_better_than_rounded_to_nearest_in_these_hessians(method):
    records = method(task_of("llama"), lambda: [joined("llama")])
    assert all(record.error < record.error_before for record in records)
