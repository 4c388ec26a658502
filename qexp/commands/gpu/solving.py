"""Costs of block-wise methods, and of the column loop of a solver."""

from typing import Any

import torch

from qexp.commands.bench.sizes import Sizes
from qexp.commands.bench.timing import counter, empty_cache, loaded, peak, products, spent
from qexp.common import captured
from qexp.config.instantiate import instantiate
from qexp.grid import IntGrid
from qexp.solvers import GPTQ
from qexp.step import Step
from qexp.task import Batch, Task

METHODS = ("gptq", "spqr", "oac")
SIDE = 8192  # of the product that the peak rate is measured with


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
        with counter() as counted:
            _costs(task, batches, method)
        costs = _costs(task, batches, method)
        operations = counted.get_total_flops()
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


def replayed(sizes: Sizes, device: str) -> dict[str, Any]:
    """GPTQ on one matrix with the column loop launched kernel by kernel, and replayed as a graph:
    the seconds of each, those of the first replayed call, and whether the digits are equal."""
    task, _ = loaded(sizes.config(device, blocks=1))
    linear = next(iter(task.linears().values()))
    weight = linear.weight.detach().float()
    inputs = torch.randn(2 * weight.shape[1], weight.shape[1], device=weight.device)
    hessian = inputs.T @ inputs
    solver = GPTQ(IntGrid(4, group_size=sizes.group), act_order=True, static_groups=True)

    def solve() -> torch.Tensor:
        return solver(weight, hessian).weight

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
