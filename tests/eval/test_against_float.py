"""The distance from the float model: identities, hand computations, one float pass."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.protocols import changed, full_losses, llama, protocol, start

from qexp.common.errors import UserError
from qexp.eval.against_float import AgainstFloat, changes, compare, percentile, summary
from qexp.eval.base import FloatModel, digest
from qexp.eval.windowed import Windowed

pytestmark = pytest.mark.usefixtures("own_cache")


def against(**fields: object) -> AgainstFloat:
    windows = protocol("held_out", **({"length": 32, "limit": 6} | fields))
    assert isinstance(windows, Windowed)
    return AgainstFloat(name="against_float", protocol=windows)


def test_the_same_model_is_at_no_distance(tmp_path: Path) -> None:
    task = llama()
    found = against().measure_float(start(task, tmp_path))(task)
    assert found["agreement"] == 1 and found["windows"] == 6 and found["tokens"] == 6 * 31
    for key in ("kl", "right_to_wrong", "wrong_to_right", "loss_change", "loss_change_p99"):
        assert found[key] == found[f"{key}_stderr"] == 0


def test_against_a_hand_computation(tmp_path: Path) -> None:
    plain, other = llama(), changed(0.05)
    found = against().measure_float(start(plain, tmp_path))(other)
    windows = [w.tokens for part in against().protocol.passages(plain) for w in part.windows]
    kl, same, lost, won, change = [], [], [], [], []
    with torch.no_grad():
        for tokens in windows:
            p, q = (m.model(tokens[None]).logits[0, :-1].log_softmax(-1) for m in (plain, other))
            kl.append((p.exp() * (p - q)).sum(-1))
            a, b = p.argmax(-1) == tokens[1:], q.argmax(-1) == tokens[1:]
            same.append((p.argmax(-1) == q.argmax(-1)).float())
            lost.append((a & ~b).float())
            won.append((b & ~a).float())
            change.append(full_losses(other, tokens[None]) - full_losses(plain, tokens[None]))
    expected = zip(
        ("kl", "agreement", "right_to_wrong", "wrong_to_right", "loss_change"),
        (kl, same, lost, won, change),
        strict=True,
    )
    for key, parts in expected:
        means = torch.stack([part.mean() for part in parts]).double()
        assert found[key] == pytest.approx(float(means.mean()), rel=1e-3, abs=1e-7)
        error = float(means.std()) / math.sqrt(6)  # windows of one size
        assert found[f"{key}_stderr"] == pytest.approx(error, rel=1e-3, abs=1e-7)
    last = float(np.quantile(torch.cat(change).numpy(), 0.99))
    assert found["loss_change_p99"] == pytest.approx(last, rel=1e-3)
    assert found["loss_change_p99_stderr"] > 0


def test_more_change_is_more_distance(tmp_path: Path) -> None:
    measure = against().measure_float(start(llama(), tmp_path))
    found = [measure(changed(scale)) for scale in (0.005, 0.02, 0.08)]
    assert found[0]["kl"] < found[1]["kl"] < found[2]["kl"]
    assert found[0]["agreement"] > found[2]["agreement"]


def test_the_float_model_runs_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, other = llama(), changed(0.05)
    once = against().measure_float(start(plain, tmp_path))(other)
    monkeypatch.setattr(plain, "hidden", lambda ids: pytest.fail("measured twice"))
    assert against().measure_float(start(plain, tmp_path))(other) == once
    with pytest.raises(pytest.fail.Exception):
        FloatModel({"weights": "v"}, lambda: plain, tmp_path)
        against().measure_float(FloatModel({"weights": "v"}, lambda: plain, tmp_path))


def test_later_changes_of_the_head_do_not_reach_the_reference(tmp_path: Path) -> None:
    task = llama()
    measure = against().measure_float(start(task, tmp_path))
    task.model.lm_head.weight.data *= 2
    assert measure(task)["kl"] > 1e-4


def test_measures_of_single_positions() -> None:
    old = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.7, 0.1]]).log()
    new = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]]).log()
    found = compare(old, new, torch.tensor([0, 1]))
    kl = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    torch.testing.assert_close(found[0, 0], torch.tensor(kl))
    assert found[1].tolist() == [0, 1] and found[2].tolist() == [1, 0]
    assert found[3].tolist() == [0, 0]
    torch.testing.assert_close(found[4], torch.tensor([math.log(2), math.log(7 / 8)]))


def test_windows_of_different_sizes_weigh_by_tokens() -> None:
    found = torch.zeros(5, 4)
    found[0] = torch.tensor([1.0, 1.0, 1.0, 5.0])
    numbers = summary(found.double(), [3, 1])
    assert numbers["kl"] == 2.0
    spread = ((3 - 2 * 3) ** 2 + (5 - 2 * 1) ** 2) / 4**2
    assert numbers["kl_stderr"] == pytest.approx(math.sqrt(spread * 2 / 1))
    assert math.isnan(summary(found.double(), [4])["loss_change_p99_stderr"])


@pytest.mark.parametrize("count", [1, 2, 7, 100, 1234])
def test_percentile_is_that_of_numpy(count: int) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(count)).double()
    assert percentile(values, 0.99) == pytest.approx(float(np.quantile(values.numpy(), 0.99)))


def test_flips_of_items() -> None:
    found = changes(
        torch.tensor([1.0, 1, 0, 0, 1], dtype=torch.float64),
        torch.tensor([0.0, 1, 1, 0, 0], dtype=torch.float64),
    )
    assert found["right_to_wrong"] == 0.4 and found["wrong_to_right"] == 0.2
    assert found["change"] == pytest.approx(-0.2)
    values = np.array([-1, 0, 1, 0, -1])
    assert found["change_stderr"] == pytest.approx(values.std(ddof=1) / math.sqrt(5))


def test_it_is_defined_by_its_protocol() -> None:
    one = digest(against().definition())
    assert one == digest(against(batch_tokens=1).definition())
    assert one != digest(against(limit=5).definition())
    assert one != digest(against().protocol.definition())


def test_nan_and_a_missing_float_model_are_errors(tmp_path: Path) -> None:
    task = llama()
    measure = against().measure_float(start(task, tmp_path))
    next(task.blocks.parameters()).data[0, 0] = math.nan
    with pytest.raises(UserError, match=r"against_float.*NaN"):
        measure(task)
    with pytest.raises(UserError, match="needs the float model"):
        against()(task)
