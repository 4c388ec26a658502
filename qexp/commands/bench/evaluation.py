"""Benchmark of evaluation: perplexity before and after a method."""

from omegaconf import DictConfig

from qexp.commands.bench.timing import loaded, show, timed
from qexp.config.instantiate import instantiate


def evaluation(cfg: DictConfig) -> None:
    """Time of evaluation after the method, relative to evaluation before it."""
    task, batches = loaded(cfg)
    [evaluator] = [instantiate(node) for node in cfg.eval.values()]
    evaluator(task)  # tokenizes and warms up
    stages = {"float": timed(lambda: evaluator(task))}
    instantiate(cfg.method)(task, lambda: batches)
    stages["quantized"] = timed(lambda: evaluator(task))
    show(stages, "float")
