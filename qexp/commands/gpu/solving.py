"""Costs of block-wise methods, and of the column loop of a solver."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from qexp.commands.bench.timing import empty_cache, loaded, peak, spent
from qexp.commands.gpu.sizes import Sizes
from qexp.common import captured
from qexp.config.instantiate import instantiate
from qexp.grid import IntGrid
from qexp.solvers import GPTQ
from qexp.task import Task

METHODS = ("gptq", "spqr", "oac")
SIDE, REPEATS = 8192, 8  # of the products that the peak rate is measured with


def solving(sizes: Sizes, device: str) -> dict[str, Any]:
    """Seconds and peak bytes of each method on one block and on all, and the products that it
    computes as a share of the rate of a large product in bfloat16.

    The products (forward passes, Hessians, factorizations apart) are counted in a first run, which
    also warms up."""
    task, batches = loaded(sizes.config(device))
    found: dict[str, Any] = {"product": products(task, min(SIDE, 2 * sizes.hidden))}
    peak_rate = found["product"]["bfloat16 rate"]
    host = {name: tensor.to("cpu", copy=True) for name, tensor in task.model.state_dict().items()}
    for blocks in sorted({sizes.blocks, 1}, reverse=True):
        del task.blocks[blocks:]
        for name in METHODS:
            method = instantiate(sizes.config(device, *_words(name, sizes)).method)

            def run(method: Any = method) -> None:
                empty_cache()
                method(task, lambda: batches)

            with FlopCounterMode(display=False) as counter:
                run()
            task.model.load_state_dict(host, strict=False)
            peak(task)  # from here on
            seconds = spent(task, run)
            task.model.load_state_dict(host, strict=False)
            operations = counter.get_total_flops()
            found[f"{name}, {blocks} block{'s' * (blocks > 1)}"] = {
                "operations": operations,
                "seconds": seconds,
                "bytes": peak(task),
                "share": operations / seconds / peak_rate,
            }
    return found


def _words(name: str, sizes: Sizes) -> list[str]:
    groups = [] if name in ("spqr", "oac") else [f"weight.group_size={sizes.group}"]
    return [f"method={name}", *groups]


def products(task: Task, side: int) -> dict[str, float]:
    """Operations per second of square products on the task's device, by dtype."""
    rates: dict[str, float] = {"side": float(side)}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(side, side, device=task.device, dtype=dtype) for _ in range(2))

        def multiply(a: Any = a, b: Any = b) -> None:
            for _ in range(REPEATS):
                torch.mm(a, b)

        multiply()
        seconds = spent(task, multiply)
        rates[f"{str(dtype).removeprefix('torch.')} rate"] = 2 * REPEATS * side**3 / seconds
    return rates


def replayed(sizes: Sizes, device: str) -> dict[str, Any]:
    """GPTQ on one matrix with the column loop launched kernel by kernel, and replayed as a graph:
    the seconds of each, those of the first replayed call, and whether the digits are equal."""
    task, _ = loaded(sizes.config(device, blocks=1))
    linear = next(iter(task.linears().values()))
    weight = linear.weight.detach().float()
    inputs = torch.randn(2 * weight.shape[1], weight.shape[1], device=weight.device)
    hessian = inputs.T @ inputs
    solver = GPTQ(IntGrid(4, group_size=sizes.group), act_order=True, static_groups=True)
    solve: Callable[[], torch.Tensor] = lambda: solver(weight, hessian).weight  # noqa: E731
    first = solve()
    found: dict[str, Any] = {
        "columns": weight.shape[1],
        "equal when repeated": torch.equal(first, solve()),
        "seconds": spent(task, solve),
    }
    captured.replay(True)
    try:
        found["tracing seconds"] = spent(task, solve)
        found["replayed seconds"] = spent(task, solve)
        found["equal when replayed"] = torch.equal(first, solve())
    finally:
        captured.replay(False)
    on_host = solver(weight.cpu(), hessian.cpu()).weight
    found["equal to the CPU, of all weights"] = float((first.cpu() == on_host).double().mean())
    return found
