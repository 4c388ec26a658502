"""Cost laws: counts of operations against torch's, fits of known laws, and the bench."""

import math
from dataclasses import replace

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from qexp.commands import bench
from qexp.commands.bench import laws
from qexp.commands.bench.sizes import Sizes
from qexp.commands.bench.timing import counter
from qexp.common.errors import UserError
from qexp.config.instantiate import instantiate
from qexp.hessian import second_moment
from qexp.hessian.layerwise import STRIP
from qexp.runs import resolvers
from qexp.task import CausalLM

TINY = Sizes(64, 176, 4, 2, 264, blocks=2, sequences=3, length=16)


@pytest.fixture(autouse=True)
def free(monkeypatch, tmp_path) -> None:
    resolvers.register()
    monkeypatch.setattr(GlobalHydra.instance(), "hydra", None)
    monkeypatch.setenv("QEXP_CACHE_DIR", str(tmp_path))  # put back afterwards


def test_operations_of_a_forward_pass_are_those_that_torch_counts() -> None:
    task = CausalLM(instantiate(TINY.config("cpu", "model.dtype=float32").model).loaded().model)
    task.model.set_attn_implementation("eager")  # the products of the fused one are not counted
    ids = torch.randint(264, (TINY.sequences, TINY.length))
    counts = laws.operations(TINY)
    with torch.no_grad(), counter() as counted:
        hidden = task.hidden(ids)
    assert counted.get_total_flops() == counts["forward"]
    with torch.no_grad(), counter() as counted:
        task.head(hidden)
    assert counted.get_total_flops() == counts["evaluation"] - counts["forward"]
    weights = sum(linear.weight.numel() for linear in task.linears().values())
    assert counts["pack"] == 2 * weights


def test_operations_of_a_hessian_are_half_of_those_of_the_product() -> None:
    columns = 4 * STRIP
    with counter() as counted:
        second_moment([torch.randn(7, columns)])
    assert 7 * columns**2 < counted.get_total_flops() < 1.5 * 7 * columns**2
    assert laws.operations(replace(TINY, hidden=columns, intermediate=columns))["Hessian"] == (
        TINY.blocks * TINY.tokens * 4 * columns**2
    )


def test_solving_grows_with_the_third_power_of_the_width() -> None:
    twice = replace(TINY, hidden=128, intermediate=352, heads=8, kv_heads=4)
    before, after = laws.operations(TINY), laws.operations(twice)
    assert after["solve"] == pytest.approx(8 * before["solve"])
    assert after["write"] == pytest.approx(8 * before["write"])
    more = laws.operations(replace(TINY, blocks=4))
    assert more["solve"] == 2 * before["solve"] and more["forward"] == 2 * before["forward"]


def test_a_fit_finds_the_law_and_what_it_leaves() -> None:
    counts = [1e6, 1e7, 1e8, 1e9]
    exact = laws.fit(counts, [3e-9 * count**1.1 for count in counts])
    assert exact.exponent == pytest.approx(1.1) and exact.deviation == pytest.approx(0, abs=1e-9)
    assert exact.at(1e12) == pytest.approx(3e-9 * 1e12**1.1)
    assert exact.error(1e12) == pytest.approx(1)
    away = [count * math.exp(d) for count, d in zip(counts, (1, -1, -1, 1), strict=True)]
    noisy = laws.fit(counts, away)
    assert noisy.exponent == pytest.approx(1) and noisy.deviation == pytest.approx(math.sqrt(2))
    assert 1 < noisy.error(10**7.5) < noisy.error(1e9) < noisy.error(1e12)
    with pytest.raises(ValueError, match="two different counts"):
        laws.fit([2, 2], [1, 3])


def test_a_prediction_is_the_sum_of_its_stages_on_faster_hardware() -> None:
    counts = laws.operations(TINY)
    own = {stage: laws.fit([1, 10], [2, 20]) for stage in laws.STAGES}
    found = laws.predicted(own, TINY, dict.fromkeys(laws.STAGES, 4.0))
    assert found["solve"].seconds == pytest.approx(counts["solve"] / 2)
    assert found["all"].seconds == pytest.approx(sum(counts.values()) / 2)
    assert found["all"].least == pytest.approx(found["all"].most)  # two points have no error
    slow = laws.fit([1, 100], [1, 10])  # exponent 1/2: the law would be faster than any point
    bounded = laws.predicted({"solve": slow}, TINY, {"solve": 1.0})["solve"]
    assert bounded.seconds == pytest.approx(counts["solve"] / 10)
    assert bounded.seconds > slow.at(counts["solve"])


WORDS = ["+scaling.widths=[64]", "+scaling.sequences=[2]", "+scaling.blocks=[1,2]"]
WORDS += ["+scaling.middle=[64,2,1]", "+scaling.head=16", "+scaling.length=16"]
WORDS += ["+scaling.vocabulary=264", "weight.group_size=16", "threads=1"]


@pytest.mark.slow
def test_the_bench_prints_costs_exponents_and_predictions(capsys) -> None:
    bench.main(["scaling", *WORDS, "+scaling.rate=1e15"])
    printed = capsys.readouterr().out
    for stage in laws.STAGES:
        lines = [line for line in printed.splitlines() if line.split()[:1] == [stage]]
        assert len(lines) == 2 + 1 + 2, stage  # sizes, exponents, larger models
    assert "70 B" in printed and "in the prediction: 1e+15" in printed


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("+scaling.width=64", "scaling.width: is unknown"),
        ("+scaling.widths=[100]", "scaling.widths: 100 is no multiple of 64"),
        ("+scaling.length=1", "scaling.length=1"),
        ("+scaling.blocks=[1]", "scaling: sizes differ in sequences alone"),
        ("method=rtn", "give method=gptq"),
    ],
)
def test_what_cannot_be_measured_is_named(word, said) -> None:
    with pytest.raises(UserError, match=said.replace(".", r"\.")):
        bench.main(["scaling", *[own for own in WORDS if own[:16] != word[:16]], word])
