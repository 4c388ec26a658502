"""Benchmark of the outlier penalty: a training step with and without it."""

import torch
from omegaconf import DictConfig

from qexp.commands.bench.timing import loaded, show, spent
from qexp.config.instantiate import instantiate
from qexp.methods.quanttune import QuantTune


def penalty(cfg: DictConfig) -> None:
    """The fastest step of each kind, in turn, so that both run under the same conditions."""
    task, batches = loaded(cfg)
    method = instantiate(cfg.method)
    if not isinstance(method, QuantTune):
        raise SystemExit("bench.py penalty: give method=quanttune")
    training, measured = method.training, method.training.penalty
    assert measured is not None
    batch = {key: value[: training.trainer.sequences] for key, value in batches[0].items()}
    low = training.trainer.precision.startswith("bf16")
    optimizer = training.optimizer.optimizer(training.trained.parameters(task))
    task.train()

    def step(watched: bool) -> None:
        with torch.autocast(task.device.type, torch.bfloat16, enabled=low):
            loss = task.loss(batch)
            if watched:
                loss = loss + watch.take(loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = {"without": float("inf"), "with": float("inf")}
    for _ in range(4):
        step(watched=False)  # not timed: caches are cold after a step of the other kind
        seconds["without"] = min(seconds["without"], spent(task, lambda: step(watched=False)))
        with measured.watch(task) as watch:
            step(watched=True)
            seconds["with"] = min(seconds["with"], spent(task, lambda: step(watched=True)))
    show(seconds, "without")
    print(f"{'throughput with penalty':<28}{seconds['without'] / seconds['with']:8.1%}")
