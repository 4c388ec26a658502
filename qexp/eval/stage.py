"""The stage of a run that evaluates its model."""

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext

from qexp.eval.base import Evaluator, digest, warn_of_float_cache
from qexp.eval.token_losses import shared
from qexp.quantizers.scheme import all_called
from qexp.runs.provenance import Provenance
from qexp.task import Task


def evaluate(
    evaluators: Sequence[Evaluator], task: Task, provenance: Provenance
) -> dict[str, float]:
    """The metrics of every evaluator, and in the provenance the definition of each."""
    metrics: dict[str, float] = {}
    with shared() if len(evaluators) > 1 else nullcontext():
        for index, evaluator in enumerate(evaluators):
            metrics |= _measure(evaluator, task, provenance, first=not index)
    return metrics


def _measure(
    evaluator: Evaluator, task: Task, provenance: Provenance, first: bool
) -> dict[str, float]:
    warn_of_float_cache(evaluator, task)
    with provenance.stage(f"evaluate {evaluator.name}"), ExitStack() as stack:
        if first:
            stack.enter_context(all_called(task, f"eval {evaluator.name}"))
        numbers = evaluator(task)
    named = {f"{evaluator.name}/{key}": float(value) for key, value in numbers.items()}
    for logger in task.workspace.loggers:
        logger.log_metrics(named)
    definition = evaluator.definition() | evaluator.followed(task)
    entry = {
        "digest": digest(definition),
        "definition": definition,
        "higher_is_better": sorted(evaluator.higher_is_better),
        **evaluator.facts(task),
    }
    provenance.add(protocols={evaluator.name: entry})
    return named
