"""The column sweep: replayed blocks, and its digits on an accelerator."""

from collections.abc import Iterator

import pytest
import torch
from helpers.problems import problem
from torch import Tensor

from qexp.common import captured
from qexp.grid import IntGrid
from qexp.solvers import GPTQ, Solver, SpQR
from qexp.solvers import sweep as sweeping
from qexp.solvers.sparse import SparseGPT
from qexp.solvers.sweep import sweep

LEVEL = IntGrid(3, group_size=16, include_zero=False, real_zero=True)
TWO = IntGrid(3, group_size=16, include_zero=False, real_zero=True, scales=LEVEL, zeros=LEVEL)
SOLVERS: dict[str, Solver] = {
    "row": GPTQ(IntGrid(4)),
    "ordered groups": GPTQ(IntGrid(4, group_size=32), act_order=True, static_groups=True),
    "groups": GPTQ(IntGrid(4, group_size=32)),
    "spqr": SpQR(TWO),
    "sparse": SparseGPT(None),
}


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """On the CPU, with the same kernels; the number of launches of each traced graph."""
    from torch._dynamo.backends.common import aot_autograd

    graphs: list[int] = []

    def compiler(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(sum(node.op == "call_function" for node in graph.graph.nodes))
        return graph

    backend = aot_autograd(fw_compiler=compiler, inference_compiler=compiler)
    monkeypatch.setattr(captured, "DEVICES", {"cpu": backend})
    fresh = captured.captured(sweeping._columns.__wrapped__)  # type: ignore[attr-defined]
    monkeypatch.setattr(sweeping, "_columns", fresh)
    captured.replay(True)
    torch._dynamo.reset()
    yield graphs
    captured.replay(False)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(
    "solver",
    [
        GPTQ(IntGrid(3), block=16),
        GPTQ(IntGrid(3, group_size=16), act_order=True, static_groups=True, block=16),
        SpQR(TWO, outlier_dtype="bfloat16", block=16),
    ],
    ids=["row", "static", "spqr"],
)
def test_a_replayed_block_gives_equal_digits_and_is_traced_once(solver, replayed) -> None:
    problems = [problem(16, 48, seed) for seed in (0, 1)]
    captured.replay(False)
    expected = [solver(*each).weight for each in problems]
    captured.replay(True)
    for one, each in zip(expected, problems, strict=True):
        assert torch.equal(solver(*each).weight, one)
    assert len(replayed) == 1  # six blocks of two matrices


def test_a_block_changes_none_of_its_arguments() -> None:
    weight, hessian = problem(16, 48)
    before = weight.clone(), hessian.clone()
    found = sweep(weight, hessian, lambda *_: (), lambda w: w.round(), 48, block=16)
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])
    assert torch.equal(found.rounded, found.values.round())


@pytest.mark.gpu
@pytest.mark.parametrize("name", SOLVERS)
def test_an_accelerator_rounds_as_the_cpu_does(name: str, accelerator: torch.device) -> None:
    solver, weight, hessian = SOLVERS[name], *problem(32, 64)
    ours = solver(weight.to(accelerator), hessian.to(accelerator)).weight
    assert ours.device.type == accelerator.type
    assert (ours.cpu() - solver(weight, hessian).weight).abs().lt(1e-4).double().mean() >= 0.99


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["row", "ordered groups", "spqr"])
def test_cuda_replays_equal_digits(name: str, accelerator: torch.device) -> None:
    if accelerator.type not in captured.DEVICES:
        pytest.skip("no CUDA device")
    solver, found = SOLVERS[name], []
    for wanted in (False, True, True):
        captured.replay(wanted)
        problems = (problem(32, 256, seed) for seed in (0, 1))
        found.append([solver(*(x.to(accelerator) for x in each)).weight for each in problems])
    captured.replay(False)
    for replayed in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], replayed, strict=True))
