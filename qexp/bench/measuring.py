"""What measuring costs: perplexity before and after a method, and zero-shot suites."""

import time

from omegaconf import DictConfig

from qexp.bench.clock import loaded, show, timed
from qexp.build import build


def evaluation(cfg: DictConfig) -> None:
    """Evaluation after the method against evaluation before it."""
    task, batches = loaded(cfg)
    [evaluator] = [build(node) for node in cfg.eval.values()]
    evaluator(task)  # tokenises
    stages = {"float": timed(lambda: evaluator(task))}
    build(cfg.method)(task, lambda: batches)
    stages["quantized"] = timed(lambda: evaluator(task))
    show(stages, "float")


def harness(cfg: DictConfig) -> None:
    """Items per second beside the harness's own model `hf`: same rows, same batch size."""
    from lm_eval.models.huggingface import HFLM

    from qexp.eval.harness_model import Model

    task, _ = loaded(cfg)
    [evaluator] = [build(node) for node in cfg.eval.values()]
    evaluator.files()  # the harness's index and the rows are read here, outside the clock
    rows = evaluator.batch_size
    models = {
        "hf": HFLM(task.model, tokenizer=task.tokenizer, batch_size=rows),
        "qexp": Model(task, rows, evaluator.name),
    }
    seconds, said = {}, {}
    for name, model in models.items():
        start = time.perf_counter()
        said[name] = evaluator.ask(model)
        seconds[name] = time.perf_counter() - start
    show(seconds, "hf")
    items = sum(values["sample_len"] for values in said["hf"]["results"].values())
    for name, spent in seconds.items():
        print(f"{name:<28}{items / spent:8.2f} items/s")
    pairs = [
        (one[key], other[key])
        for task_name, samples in said["hf"]["samples"].items()
        for one, other in zip(samples, said["qexp"]["samples"][task_name], strict=True)
        for key in one["metrics"]
    ]
    print(f"{'same answers':<28}{sum(a == b for a, b in pairs):8d} of {len(pairs)}")
