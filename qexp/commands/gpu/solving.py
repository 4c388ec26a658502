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
from qexp.step import Step
from qexp.task import Batch, Task

METHODS = ("gptq", "spqr", "oac")
SIDE, REPEATS = 8192, 8  # of the products that the peak rate is measured with


def solving(sizes: Sizes, device: str) -> dict[str, Any]:
    """Seconds and peak bytes of each method on one block and on all; on one block also the products
    that it computes, as a share of the rate of a large product in bfloat16.

    These (forward and backward passes, Hessians, updates of later columns) are counted in a first
    run, which also warms up."""
    task, batches = loaded(sizes.config(device))
    found: dict[str, Any] = {"product": products(task, min(SIDE, 2 * sizes.hidden))}
    others = list(task.blocks[1:])
    del task.blocks[1:]
    for name in METHODS:
        method = instantiate(sizes.config(device, *_words(name, sizes)).method)
        with FlopCounterMode(display=False) as counter:
            _costs(task, batches, method)
        costs = _costs(task, batches, method)
        operations = counter.get_total_flops()
        share = operations / costs["seconds"] / found["product"]["bfloat16 rate"]
        found[f"{name}, 1 block"] = {"operations": operations, "share": share, **costs}
    task.blocks.extend(others)
    if others:
        for name in METHODS:
            method = instantiate(sizes.config(device, *_words(name, sizes)).method)
            found[f"{name}, {sizes.blocks} blocks"] = _costs(task, batches, method)
    return found


def _costs(task: Task, batches: list[Batch], method: Step) -> dict[str, float]:
    """Of a method on a model, whose weights are afterwards as before."""
    before = {name: tensor.to("cpu", copy=True) for name, tensor in task.model.state_dict().items()}
    empty_cache()
    peak(task)  # from here on
    seconds = spent(task, lambda: method(task, lambda: batches))
    held = peak(task)
    task.model.load_state_dict(before)
    return {"seconds": seconds, "bytes": held}


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
