"""What measuring costs: perplexity before and after a method."""

from omegaconf import DictConfig

from qexp.commands.bench.timing import loaded, show, timed
from qexp.config.instantiate import instantiate


def evaluation(cfg: DictConfig) -> None:
    """Evaluation after the method against evaluation before it."""
    task, batches = loaded(cfg)
    [evaluator] = [instantiate(node) for node in cfg.eval.values()]
    evaluator(task)  # tokenises
    stages = {"float": timed(lambda: evaluator(task))}
    instantiate(cfg.method)(task, lambda: batches)
    stages["quantized"] = timed(lambda: evaluator(task))
    show(stages, "float")
