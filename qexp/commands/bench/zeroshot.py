"""Benchmark of zero-shot tasks against the harness's own model `hf`: time and equal answers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from omegaconf import DictConfig
from torch import Tensor, nn

from qexp.commands.bench.timing import loaded, spent
from qexp.config.instantiate import instantiate
from qexp.eval.harness import Harness
from qexp.eval.harness.outcome import Outcome
from qexp.task import Task

HEADS = (
    "task",
    "items",
    "hf, items/s",
    "qexp, items/s",
    "ratio",
    "products, hf / qexp",
    "same answers",
    "largest difference of a log-likelihood",
    "metrics, of hf in brackets where six digits differ",
)


def zeroshot(cfg: DictConfig) -> None:
    """Prints a line for each harness task in `eval`, with the same rows and batch size for both.

    Other evaluators in `eval` run after them, such as lm_eval_word to compare with task `wikitext`.
    """
    task, _ = loaded(cfg)
    print(f"| {' | '.join(HEADS)} |\n|---|{'--:|' * (len(HEADS) - 2)}---|")
    evaluators = [instantiate(node) for node in cfg.eval.values()]
    suites = [each for each in evaluators if isinstance(each, Harness)]
    ours_first = False
    for suite in suites:
        for name in suite.tasks:
            line = compare(task, replace(suite, tasks=[name]), ours_first)
            print(f"| {' | '.join(line)} |", flush=True)
            ours_first = not ours_first
    for evaluator in evaluators:
        if evaluator not in suites:
            print(f"{evaluator.name}: {_shown(evaluator(task))}")


def compare(task: Task, evaluator: Harness, ours_first: bool) -> list[str]:
    """The cells of one task's line, by HEADS."""
    from lm_eval.models.huggingface import HFLM

    from qexp.eval.harness.model import Model

    asked = evaluator.definition()["tasks"]  # loads index, rows and prompts, which are not timed
    models = {
        "hf": HFLM(task.model, tokenizer=task.tokenizer, batch_size=evaluator.batch_size),
        "qexp": Model(task, evaluator.batch_size, evaluator.name),
    }
    said: dict[str, Outcome] = {}
    seconds: dict[str, float] = {}
    products: dict[str, int] = {}

    def ask(side: str) -> None:
        said[side] = evaluator.outcome_of(models[side])

    for side in sorted(models, reverse=ours_first):
        with multiplied(task) as count:
            seconds[side] = spent(task, partial(ask, side))
        products[side] = sum(count)
    theirs, ours = said["hf"], said["qexp"]
    name = evaluator.tasks[0]  # for a group only its own numbers, not those of its tasks
    shown = {k: v for k, v in ours.numbers.items() if k.partition("/")[0] == name} or ours.numbers
    items = sum(ours.numbers[f"{each}/items"] for each in asked)
    pairs = list(zip(theirs.answers, ours.answers, strict=True))
    gaps = [abs(a - b) for a, b in pairs if isinstance(a, float) and isinstance(b, float)]
    same = [a == b for a, b in pairs if isinstance(a, str)]
    for one, other in () if same else zip(theirs.items.values(), ours.items.values(), strict=True):
        same += (one == other).tolist()
    return [
        ", ".join(sorted({key.partition("/")[0] for key in shown})),
        f"{items:.0f}",
        *(f"{items / seconds[side]:.2f}" for side in models),
        f"{seconds['hf'] / seconds['qexp']:.2f}",
        f"{products['hf'] / products['qexp']:.2f}",
        f"{sum(same)} of {len(same)}" if same else "",
        f"{max(gaps):.1e}" if gaps else "",
        _shown(shown, theirs.numbers),
    ]


@contextmanager
def multiplied(task: Task) -> Iterator[list[int]]:
    """Collects the multiply-adds of each matrix product with a weight during the context."""
    found: list[int] = []

    def count(linear: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found.append(inputs[0].numel() * linear.out_features)

    modules = [module for module in task.model.modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_hook(count) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _shown(numbers: dict[str, float], others: dict[str, float] | None = None) -> str:
    texts = []
    for key, value in numbers.items():
        metric = key.rpartition("/")[2]
        if metric.endswith("stderr") or metric in ("items", "version", "windows", "tokens"):
            continue
        one, other = f"{value:.6g}", f"{(others or numbers)[key]:.6g}"
        texts.append(
            f"{key.partition('/')[2] or key} {one}" + (f" ({other})" if other != one else "")
        )
    return ", ".join(texts)
