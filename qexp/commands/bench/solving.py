"""Benchmarks of solvers: stages of block-wise methods, and OAC relative to SpQR."""

import time
from collections.abc import Iterator
from functools import partial

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor

from qexp.commands.bench.timing import loaded, show, spent, timed
from qexp.common.errors import UserError
from qexp.config.instantiate import instantiate
from qexp.config.location import conf
from qexp.hessian import second_moment
from qexp.hessian.output import through_tokens
from qexp.step import Step
from qexp.walk import walk


def blockwise(cfg: DictConfig) -> None:
    """Times of one forward pass, the Hessians and the solver of a block-wise method."""
    task, batches = loaded(cfg)

    def forward() -> None:
        for block in walk(task, batches):
            block.advance(lambda names, inputs: None)

    def measure(names: tuple[str, ...], inputs: Iterator[Tensor]) -> None:
        second_moment(inputs)

    def hessians() -> None:
        for block in walk(task, batches):
            block.advance(measure)

    stages = {"forward": timed(forward)}
    stages["Hessians"] = timed(hessians) - stages["forward"]
    method: Step = instantiate(cfg.method)
    start = time.perf_counter()
    records = method(task, lambda: batches)
    total = time.perf_counter() - start
    stages["solver"] = sum(record.seconds for record in records)
    stages["whole job"] = total
    show(stages, "forward")


def transform(cfg: DictConfig) -> None:
    """Time of a transform on the first blocks, relative to the method on them.

    blocks: how many; all of the model's if it has no more. Default: 1.
    """
    task, batches = loaded(cfg)
    blocks = cfg.get("blocks", 1)
    if not isinstance(blocks, int) or blocks < 1:
        raise UserError(f"blocks={blocks}: give a number of blocks, at least 1.")
    del task.blocks[blocks:]
    state = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    stages = {}
    for name, node in (("method", cfg.method), ("transform", cfg.transform)):
        task.model.load_state_dict(state)
        step: Step = instantiate(node)
        stages[name] = spent(task, partial(step, task, lambda: batches))
    show(stages, "method")


REPEATS = 5


def online(cfg: DictConfig) -> None:
    """Times of one block's forward, and forward with backward, with the online maps of the
    transform, relative to the block without them."""
    task, batches = loaded(cfg)
    del task.blocks[1:]
    step: Step = instantiate(cfg.transform)
    stages: dict[str, float] = {}

    def measure(name: str) -> None:
        block = next(walk(task, batches))
        weights = list(block.module.parameters())

        def forward() -> None:
            for _ in range(REPEATS):
                list(block.outputs())

        def train() -> None:
            with torch.enable_grad():
                for chunk, hidden in enumerate(block.inputs):
                    loss = block.replay(chunk, hidden).float().square().mean()
                    torch.autograd.grad(loss, weights, allow_unused=True)

        forward()  # the first ones are slower
        stages[f"forward, {name}"] = spent(task, forward) / REPEATS
        for parameter in weights:
            parameter.requires_grad_()
        stages[f"training, {name}"] = spent(task, train)

    measure("without maps")
    for parameter in task.parameters():
        parameter.requires_grad_(False)
    step(task, lambda: batches)
    if not task.maps:
        raise UserError("bench online: the transform leaves no online maps; give transform=quarot")
    measure("with maps")
    show(stages, "forward, without maps")


def oac(cfg: DictConfig) -> None:
    """Times of OAC with gradients in one pass, relative to SpQR on the same data.

    Seconds per block are those of the gradient pass divided by the number of blocks.
    """
    task, batches = loaded(cfg)
    state = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    tokens = batches[0]["input_ids"].shape[1]
    for shape in {(w.out_features, w.in_features) for w in task.linears().values()}:
        order = "X'(DD')X" if through_tokens(tokens, *shape) else "(D'X)'(D'X)"
        print(f"{shape[0]} x {shape[1]}: {order} at {tokens} tokens")
    with initialize_config_dir(version_base="1.3", config_dir=str(conf())):
        methods = {
            name: instantiate(compose("config", [f"method={name}"]).method)
            for name in ("spqr", "oac_one_pass")
        }
    stages = {"SpQR job": timed(lambda: methods["spqr"](task, lambda: batches))}
    task.model.load_state_dict(state)

    def gradients() -> None:
        block = next(iter(walk(task, batches)))
        methods["oac_one_pass"].hessian(block)

    stages["gradients, all blocks"] = timed(gradients)
    stages["gradients, per block"] = stages["gradients, all blocks"] / len(task.blocks)
    rest = timed(lambda: methods["oac_one_pass"](task, lambda: batches))
    stages["OAC job, Hessians cached"] = rest
    stages["OAC job"] = stages["gradients, all blocks"] + rest
    show(stages, "SpQR job")
